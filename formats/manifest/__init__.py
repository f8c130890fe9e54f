"""The manifest `codecllm.json`: its schema, its records, reading and sealing it (SPEC.md 8)."""
