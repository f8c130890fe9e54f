"""Checks and diagnosis."""
