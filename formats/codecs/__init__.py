"""Codecs: how the symbols of one chunk are packed into bytes. Registry of ids as in SPEC.md 6."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from codecllm.formats.codecs import rans
from codecllm.formats.codecs.raw import RawCodec
from codecllm.formats.codecs.zstd import ZstdCodec


class Codec(Protocol):
    """One way to pack the symbols of a chunk. Objects are stateless; threads may share them.

    Attributes:
        codec_id: number in chunk records. Two codecs share an id only if each reads the other's
            output.
        name: name in manifests.
    """

    codec_id: int
    name: str

    def encode(self, raw: Any) -> Any:
        """Returns the packed bytes of a bytes-like `raw`; equal inputs give equal outputs."""

    def decode(self, stored: Any, raw_bytes: int) -> Any:
        """Returns exactly `raw_bytes` bytes, read-only, or raises DecodeError."""


ZSTD = ZstdCodec()
CODECS: dict[int, Codec] = {codec.codec_id: codec for codec in (RawCodec(), ZSTD)}
"""Codecs whose chunks decode alone. A chunk of `rans` needs the table of its group."""

RANS_ID = rans.CODEC_ID
CODEC_NAMES: dict[int, str] = {codec_id: codec.name for codec_id, codec in CODECS.items()} | {
    RANS_ID: rans.NAME
}
CODEC_IDS: dict[str, int] = {name: codec_id for codec_id, name in CODEC_NAMES.items()}

CodecName = Literal["zstd", "rans"]
"""Codecs that a writer can be asked for; either stores a chunk `raw` where it does not shrink."""
