"""Readers of the formats exams come in."""
