"""Filling the feature cache: `on_ray` runs the encoders over a table of exams."""
