"""Weights that stay quantized or entropy-coded in memory.

`form.WeightForm` is the contract of each.
"""
