"""Triton kernels of the loader; each has its reference in `formats` or in torch, and a test that compares the two."""
