"""Sections of `python -m benchmarks.gpu`: each a function that measures on one device and yields rows."""
