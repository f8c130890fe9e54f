"""Experiments on quality per bit: parts of the quantizer, one at a time, in memory."""
