"""Shared parts of the benchmarks: floors, peak memory, rows and turns, synthetic models."""
