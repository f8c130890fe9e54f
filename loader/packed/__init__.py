"""Weights at a fixed rate in device memory, and products with them.

The layout is made at load and never stored (docs/decisions/packed-layout.md).
"""
