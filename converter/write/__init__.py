"""Encoded chunks -> shards, manifest and the output folder."""
