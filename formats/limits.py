"""Limits of the format (SPEC.md 10).

Normative: a writer stays inside them, a reader may lower but not raise them.
"""

from __future__ import annotations

from typing import Any

MANIFEST_BYTES = 64 << 20
HEADER_BYTES = 25_000_000  # the Hub's header parser stops there
SOURCE_HEADER_BYTES = 100_000_000  # safetensors' own limit, for source models
JSON_DEPTH = 16
JSON_VALUES = 1 << 19  # commas and opening brackets of a text that is decoded as a whole
RECORD_BYTES = 16 << 10
FIELD_BYTES = 256 << 10
FIELDS = 256
METADATA = 1 << 12
SIDE_FILE_BYTES = 1 << 30
TENSORS = 1 << 18
SHARDS = 1 << 16
FILES = 1 << 12
RANK = 8
DIM = 1 << 48
ELEMENTS = 1 << 48  # of a tensor
NAME_BYTES = 512
PLANES = 8
CHUNK_RAW_BYTES = 64 << 20
ZSTD_WINDOW_BYTES = 8 << 20
INTEGER = 1 << 53  # JSON numbers beyond this are not exact everywhere
SLOT_ALIGNMENT = 16
EXPANSION = 100
EXPANSION_FREE_BYTES = 256 << 20


def max_stored_bytes(raw_bytes: Any) -> Any:
    """Returns the most bytes that a chunk of `raw_bytes` (a number or an array) may take stored.

    Examples:
        >>> max_stored_bytes(131072)
        132610
    """
    return raw_bytes + raw_bytes // 255 + 1024
