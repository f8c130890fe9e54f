"""Codecs: how the symbols of one chunk are packed into bytes. Registry of ids as in SPEC.md 6."""

from __future__ import annotations

from typing import Any, Protocol

from codecllm.formats.codecs.raw import RawCodec
from codecllm.formats.codecs.zstd import ZstdCodec


class Codec(Protocol):
    """One way to pack a plane's symbols; objects are stateless and may be shared between threads.

    Attributes:
        codec_id: number in chunk records. Two codecs share an id only if each reads the other's output.
        name: name in manifests.
    """

    codec_id: int
    name: str

    def encode(self, raw: Any) -> Any:
        """Returns the packed bytes of a bytes-like, contiguous `raw`. The same input gives the same output."""

    def decode(self, stored: Any, raw_bytes: int) -> Any:
        """Returns exactly `raw_bytes` bytes (read-only, bytes-like). Raises DecodeError otherwise."""


CODECS: dict[int, Codec] = {codec.codec_id: codec for codec in (RawCodec(), ZstdCodec())}
CODEC_NAMES: dict[int, str] = {codec_id: codec.name for codec_id, codec in CODECS.items()}
CODEC_IDS: dict[str, int] = {codec.name: codec_id for codec_id, codec in CODECS.items()}
