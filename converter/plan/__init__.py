"""Decisions before any byte is written: the scheme of a tensor and its quantization parameters."""
