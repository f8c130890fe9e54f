"""Shards: headers of safetensors files, the side tensors beside a payload, and chunk tables (SPEC.md 4 and 5)."""
