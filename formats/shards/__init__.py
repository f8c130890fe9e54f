"""Shards: headers of safetensors files, side tensors and chunk tables (SPEC.md 4 and 5)."""
