"""Starts of vLLM on containers, beside the plain model."""
