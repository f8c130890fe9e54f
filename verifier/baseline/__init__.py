"""The baseline: the texts or hidden states of a model, recorded and compared."""
