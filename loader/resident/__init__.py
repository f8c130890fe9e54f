"""Weights that stay quantized or entropy-coded in memory."""
