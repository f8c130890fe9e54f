"""Checks that need no model: structure, checksums, decoding, ratio, comparison with the source."""
