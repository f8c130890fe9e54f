"""Experts of a layer on a GPU: their codes in one tensor, and one kernel for all of them."""
