"""Hostile containers: no code of theirs is run."""
