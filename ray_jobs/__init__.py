"""The jobs that `ray job submit` runs."""
