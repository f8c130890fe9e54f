"""Symbols of tiles -> packed chunks with their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.checksums import xxh3
from codecllm.formats.codecs import CODEC_IDS, RANS_ID, CodecName, rans
from codecllm.formats.codecs.entropy import (
    counted_entropy_bits,
    estimated_entropy_bits,
    symbol_counts,
)
from codecllm.formats.codecs.rans_fit import coded_bytes, fit_table
from codecllm.formats.codecs.rans_table import pack_table
from codecllm.formats.codecs.zstd import SPARSE_LOW_BITS, ZstdCodec
from codecllm.formats.shards.chunk_table import RECORD, slot_bytes

_ZSTD = ZstdCodec()
_RAW_ID = CODEC_IDS["raw"]
# A chunk is stored coded if that saves 1/128 of it: less is not worth the decoding.
_MIN_GAIN = 128


@dataclass(frozen=True, slots=True)
class PackedChunks:
    """The chunks of a block, packed.

    Attributes:
        slots: bytes of the chunks' slots, in order.
        records: RECORD [chunks].
        entropy_bits: per chunk of a tile, the sum over tiles one above the other.
        tables: packed frequency tables (codec `rans`), one per entry of `entropy_bits`; empty where
            no chunk uses it.
    """

    slots: list[Any]
    records: NDArray[Any]
    entropy_bits: list[float]
    tables: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """The result of a worker for one block.

    Attributes:
        slots: bytes of the chunks' slots, in order.
        records: RECORD [chunks].
        digested: the bytes that the tensor's digest covers: codes, or the source's bytes.
        entropy_bits: estimate per plane.
        absmax: float32 [rows] of an int8 block whose scales were found here, else None.
        worst_error: worst absolute error (int8).
        worst_steps: worst error in steps (int8 under given steps).
        problem: why int8 cannot represent this block (`non_finite`, `tiny_scale`, `codes`), or not
            in one plane (`wide`), or None. If there is one, nothing else is valid.
        wide: whether the block's codes are in two planes, though its plan does not say so: it is
            all of its tensor.
        tables: packed frequency table of each plane and, under given steps, of each tile side by
            side (codec `rans`), empty where no chunk of the block uses one.
    """

    slots: list[Any]
    records: NDArray[Any]
    digested: Any
    entropy_bits: list[float]
    absmax: NDArray[np.float32] | None = None
    worst_error: float = 0.0
    worst_steps: float = 0.0
    problem: str | None = None
    wide: bool = False
    tables: list[bytes] = field(default_factory=list)


def pack_chunks(
    planes_of: list[list[NDArray[np.uint8]]], codec: CodecName, low_bits: Sequence[int] = ()
) -> PackedChunks:
    """Packs the chunks of consecutive tiles.

    Args:
        planes_of: uint8 [n] symbols of each chunk, by tiles or, under given steps, by rows of
            tiles: entry by entry, chunks at the same place share a frequency table (codec `rans`).
            The slots may keep them: nothing may write to them later.
        codec: `zstd` or `rans`; a chunk that it does not shrink is stored `raw`.
        low_bits: of each tile, where codes are wide.
    """
    if codec == rans.NAME:
        return _pack_with_rans(planes_of, low_bits)
    chunks = _Chunks(low_bits)
    entropy = [0.0] * len(planes_of[0])
    for planes in planes_of:
        for plane, symbols in enumerate(planes):
            # The slow strategy runs only where it can pay: above many low bits a plane is nearly
            # constant.
            sparse = chunks.next_low_bits >= SPARSE_LOW_BITS
            encode = _ZSTD.encode_sparse if sparse else _ZSTD.encode
            chunks.add(symbols, encode(symbols), _ZSTD.codec_id)
            entropy[plane] += estimated_entropy_bits(symbols)
    return PackedChunks(chunks.slots, chunks.records(), entropy)


class _Chunks:
    """Slots and records of the chunks of a block, in order."""

    def __init__(self, low_bits: Sequence[int]) -> None:
        self.slots: list[Any] = []
        self._low_bits = low_bits
        self._fields: list[tuple[Any, ...]] = []

    @property
    def next_low_bits(self) -> int:
        """`low_bits` of the record of the next chunk."""
        chunk = len(self.slots)
        return self._low_bits[chunk // 2] if self._low_bits and chunk % 2 else 0

    def add(self, symbols: NDArray[np.uint8], stored: bytes | None, codec: int) -> None:
        """Adds a chunk that `codec` packed into `stored`, or could not pack (None)."""
        slot: Any
        if stored is None or not _shrinks(len(stored), symbols.size):
            size, codec, slot = symbols.size, _RAW_ID, symbols
            # A chunk that needs no padding is its own slot, without a copy.
            if slot_bytes(size) != size:
                slot = symbols.tobytes().ljust(slot_bytes(size), b"\0")
        else:
            size, slot = len(stored), stored.ljust(slot_bytes(len(stored)), b"\0")
        self._fields.append((size, codec, self.next_low_bits, (0, 0), xxh3(slot)))
        self.slots.append(slot)

    def records(self) -> NDArray[Any]:
        """Returns RECORD [chunks]."""
        return np.array(self._fields, RECORD)


def _shrinks(stored_bytes: int, raw_bytes: int) -> bool:
    return stored_bytes < raw_bytes - raw_bytes // _MIN_GAIN


def _pack_with_rans(
    planes_of: list[list[NDArray[np.uint8]]], low_bits: Sequence[int]
) -> PackedChunks:
    counts = np.array(
        [[symbol_counts(symbols) for symbols in planes] for planes in planes_of], np.int64
    )
    tables = [fit_table(plane_counts) for plane_counts in counts.sum(axis=0)]
    # Decided by expected sizes: a chunk that would stay raw is never coded.
    worth = [
        _shrinks(coded_bytes(table, chunk), int(chunk.sum()))
        for tile in counts
        for table, chunk in zip(tables, tile, strict=True)
    ]
    plain_chunks = [
        rans.Uncoded(symbols, table)
        for planes in planes_of
        for symbols, table in zip(planes, tables, strict=True)
    ]
    coded_chunks = iter(
        rans.encode_chunks([chunk for chunk, pays in zip(plain_chunks, worth, strict=True) if pays])
    )
    chunks = _Chunks(low_bits)
    for chunk, pays in zip(plain_chunks, worth, strict=True):
        chunks.add(chunk.symbols, next(coded_chunks) if pays else None, RANS_ID)
    records = chunks.records()
    is_used = (records["codec"].reshape(-1, len(tables)) == RANS_ID).any(axis=0)
    return PackedChunks(
        chunks.slots,
        records,
        [
            sum(map(counted_entropy_bits, plane_counts))
            for plane_counts in counts.transpose(1, 0, 2)
        ],
        [pack_table(table) if use else b"" for table, use in zip(tables, is_used, strict=True)],
    )
