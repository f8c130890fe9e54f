"""Sections of `python -m benchmarks.gpu`: functions that measure on a device and yield rows."""
