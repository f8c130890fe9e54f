"""Symbols of tiles -> packed chunks with their records: at once with `zstd`, in batches of many blocks with `rans`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.checksums import xxh3
from codecllm.formats.codecs import CODEC_IDS, RANS_ID, rans
from codecllm.formats.codecs.rans_fit import coded_bytes, fit_table
from codecllm.formats.codecs.rans_table import FrequencyTable, pack_table
from codecllm.formats.codecs.zstd import SPARSE_LOW_BITS, ZstdCodec
from codecllm.formats.entropy import counted_entropy_bits, estimated_entropy_bits
from codecllm.formats.shards.chunk_table import RECORD, slot_bytes

_ZSTD = ZstdCodec()
_RAW_ID = CODEC_IDS["raw"]
_MIN_GAIN = 128
"""A chunk is stored coded only if that saves 1/128 of it: less is not worth the time of decoding."""


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """What a worker hands to the writer.

    Attributes:
        slots: bytes of the chunks' slots, in order.
        records: RECORD [chunks].
        digested: the bytes that the tensor's digest covers: codes, or the source's bytes.
        entropy_bits: estimate per plane.
        absmax: float32 [rows] of an int8 block whose scales were found here, else None.
        worst_error: worst absolute error (int8).
        worst_steps: worst error in steps (int8 under given steps).
        problem: why int8 cannot represent this block (`non_finite`, `tiny_scale`, `codes`), or not in one plane (`wide`), or
            None. If there is one, nothing else is valid.
        wide: whether the block's codes are in two planes, though its plan does not say so: it is all of its tensor.
        tables: packed frequency table of each plane and, under given steps, of each tile side by side (codec `rans`), empty
            where no chunk of the block uses one.
        waiting: what `finish_blocks` still has to pack (codec `rans`); slots, records and tables are empty until then.
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
    waiting: WaitingChunks | None = None


@dataclass(frozen=True, slots=True)
class WaitingChunks:
    """The chunks of a block before they are packed by `rans`.

    Attributes:
        symbols: uint8 [n] per chunk, in order.
        tables: the table for each plane's chunks (under given steps: of each tile side by side), or None where coding does not
            shrink any of them. Chunk k has table k modulo their number.
        worth: per chunk whether it is expected to shrink.
        low_bits: of each tile, where codes are wide.
    """

    symbols: list[NDArray[np.uint8]]
    tables: list[FrequencyTable | None]
    worth: list[bool]
    low_bits: Sequence[int] = ()


def pack_chunks(
    planes_of: Iterable[list[NDArray[np.uint8]]], low_bits: Sequence[int] = ()
) -> tuple[list[Any], NDArray[Any], list[float]]:
    """Packs the planes of consecutive tiles; returns slots, records and the entropy estimate of each plane.

    `low_bits` is that of each tile, where codes are wide.
    """
    slots: list[Any] = []
    fields: list[tuple[Any, ...]] = []
    entropy: list[float] = []
    for planes in planes_of:
        entropy = entropy or [0.0] * len(planes)
        for plane, symbols in enumerate(planes):
            bits = _low_bits_of(len(fields), low_bits)
            slot, stored_bytes, codec = _pack_chunk(symbols, sparse=bits >= SPARSE_LOW_BITS)
            slots.append(slot)
            fields.append((stored_bytes, codec, bits, (0, 0), xxh3(slot)))
            entropy[plane] += estimated_entropy_bits(symbols)
    return slots, np.array(fields, RECORD), entropy


def _low_bits_of(chunk: int, low_bits: Sequence[int]) -> int:
    """Returns what the record of a chunk of the block says."""
    return low_bits[chunk // 2] if low_bits and chunk % 2 else 0


def _pack_chunk(symbols: NDArray[np.uint8], sparse: bool) -> tuple[Any, int, int]:
    """Returns a chunk's slot, its stored bytes without padding, and the codec's id."""
    encode = _ZSTD.encode_sparse if sparse else _ZSTD.encode
    return _slot(symbols, encode(symbols), _ZSTD.codec_id)


def _slot(symbols: NDArray[np.uint8], stored: bytes | None, codec: int) -> tuple[bytes, int, int]:
    """Returns slot, stored bytes and codec of a chunk that was packed into `stored`, or could not be (None)."""
    if stored is None or not _shrinks(len(stored), symbols.size):
        stored, codec = symbols.tobytes(), _RAW_ID
    size = len(stored)
    return stored.ljust(slot_bytes(size), b"\0"), size, codec


def _shrinks(stored_bytes: int, raw_bytes: int) -> bool:
    return stored_bytes < raw_bytes - raw_bytes // _MIN_GAIN


def prepare_rans(
    planes_of: list[list[NDArray[np.uint8]]], low_bits: Sequence[int] = ()
) -> tuple[WaitingChunks, list[float]]:
    """Fits the tables of a block; returns its chunks, ready to be packed, and the entropy of each plane, per chunk, summed."""
    counts = np.array(
        [[np.bincount(symbols, minlength=256) for symbols in planes] for planes in planes_of],
        np.int64,
    )
    tables: list[FrequencyTable | None] = [fit_table(plane) for plane in counts.sum(axis=0)]
    worth = [
        _shrinks(coded_bytes(table, chunk), int(chunk.sum()))
        for tile in counts
        for table, chunk in zip(tables, tile, strict=True)
        if table is not None
    ]
    tables = [
        table if any(worth[plane :: len(tables)]) else None for plane, table in enumerate(tables)
    ]
    entropy = [
        sum(counted_entropy_bits(chunk) for chunk in plane) for plane in counts.transpose(1, 0, 2)
    ]
    return WaitingChunks(
        [symbols for planes in planes_of for symbols in planes], tables, worth, low_bits
    ), entropy


def finish_blocks(blocks: list[EncodedBlock]) -> list[EncodedBlock]:
    """Packs the waiting chunks of blocks, all of them together: `rans` is slow one by one. Other blocks stay as they are."""
    uncoded = [
        (block, chunk, rans.Uncoded(block.waiting.symbols[chunk], table))
        for block in blocks
        if block.waiting is not None
        for chunk in range(len(block.waiting.symbols))
        if block.waiting.worth[chunk] and (table := _table_of(block.waiting, chunk)) is not None
    ]
    packed = rans.encode_chunks([chunk for _, _, chunk in uncoded])
    stored = {
        (id(block), chunk): data for (block, chunk, _), data in zip(uncoded, packed, strict=True)
    }
    return [
        block if block.waiting is None else _finished(block, block.waiting, stored)
        for block in blocks
    ]


def _table_of(waiting: WaitingChunks, chunk: int) -> FrequencyTable | None:
    return waiting.tables[chunk % len(waiting.tables)]


def _finished(
    block: EncodedBlock, waiting: WaitingChunks, stored: dict[tuple[int, int], bytes]
) -> EncodedBlock:
    slots, fields = [], []
    for chunk, symbols in enumerate(waiting.symbols):
        slot, stored_bytes, codec = _slot(symbols, stored.get((id(block), chunk)), RANS_ID)
        slots.append(slot)
        fields.append(
            (stored_bytes, codec, _low_bits_of(chunk, waiting.low_bits), (0, 0), xxh3(slot))
        )
    records = np.array(fields, RECORD)
    used = (records["codec"].reshape(-1, len(waiting.tables)) == RANS_ID).any(axis=0).tolist()
    tables = [
        pack_table(table) if table and use else b""
        for table, use in zip(waiting.tables, used, strict=True)
    ]
    return replace(block, slots=slots, records=records, tables=tables, waiting=None)
