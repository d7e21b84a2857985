"""Benchmarks: each prints one JSON line and keeps its last full result in `results/`."""
