"""Exams as frame groups: schema, frames, prompts, and the jobs on Ray Data."""
