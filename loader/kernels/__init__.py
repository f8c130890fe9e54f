"""Kernels of the loader. A test compares each with its reference in `formats` or in torch."""
