"""A Chinese ultrasound assistant from a hospital's own exams."""

__version__ = "0.1.0"
