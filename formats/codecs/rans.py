"""Codec `rans`: chunks are coded by the native core or, with the same bits, by numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from codecllm.formats.codecs import native, rans_numpy
from codecllm.formats.codecs.rans_numpy import Coded, Decoded, Uncoded

__all__ = ["CODEC_ID", "NAME", "Coded", "Decoded", "Uncoded", "decode_chunks", "encode_chunks"]

CODEC_ID = 2
NAME = "rans"


def decode_chunks(chunks: Sequence[Coded]) -> list[Decoded]:
    """Decodes chunks; returns the symbols or the error of each, in order."""
    if native.core is None:
        return rans_numpy.decode_chunks(chunks)
    return [_decode(chunk) for chunk in chunks]


def _decode(chunk: Coded) -> Decoded:
    assert native.core is not None
    symbols = np.empty(chunk.raw_bytes, np.uint8)
    frequencies = chunk.table.frequencies.astype(np.uint16)
    if native.core.rans_decode(chunk.stored, frequencies, chunk.table.precision, symbols):
        return symbols
    (result,) = rans_numpy.decode_chunks([chunk])  # it names the fault
    return result


def encode_chunks(chunks: Sequence[Uncoded]) -> list[bytes]:
    """Encodes chunks, each for itself; returns their stored bytes in order."""
    if native.core is None:
        return rans_numpy.encode_chunks(chunks)
    return [
        native.core.rans_encode(
            np.ascontiguousarray(chunk.symbols),
            chunk.table.frequencies.astype(np.uint16),
            chunk.table.precision,
        )
        for chunk in chunks
    ]
