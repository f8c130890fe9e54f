"""Codec `raw`: the symbols as they are."""

from __future__ import annotations

from typing import Any

from codecllm.formats.errors import DecodeError


class RawCodec:
    """Stores the plane's bytes unchanged."""

    codec_id = 0
    name = "raw"

    def encode(self, raw: Any) -> Any:
        """Returns `raw` itself."""
        return raw

    def decode(self, stored: Any, raw_bytes: int) -> Any:
        """Returns `stored` itself.

        Raises:
            DecodeError: its size is not `raw_bytes`.

        Examples:
            >>> RawCodec().decode(b"abc", 3)
            b'abc'
        """
        if len(stored) != raw_bytes:
            raise DecodeError("raw chunk has a wrong size", got=len(stored), expected=raw_bytes)
        return stored
