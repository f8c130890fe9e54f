"""Decoding on the CPU: threads, memory, and reading ahead."""
