"""The source model: its files, its tensors, its side files."""
