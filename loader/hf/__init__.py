"""Every call into transformers that reads a model folder."""
