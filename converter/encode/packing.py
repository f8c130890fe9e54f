"""Symbols of tiles -> packed chunks with their records, by one call of the native core a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.encode.buffers import Buffers, Scratch
from codecllm.formats.checksums import xxh3
from codecllm.formats.codecs import CODEC_IDS, RANS_ID, CodecName, native, rans
from codecllm.formats.codecs.entropy import sample_counts, symbol_counts
from codecllm.formats.codecs.rans_fit import LOG2, coded_bytes, fit_table
from codecllm.formats.codecs.rans_reference import STATE_BYTES
from codecllm.formats.codecs.rans_table import pack_table
from codecllm.formats.codecs.zstd import SPARSE_LOW_BITS, ZstdCodec
from codecllm.formats.shards.chunk_table import RECORD, slot_bytes

_ZSTD = ZstdCodec()
_RAW_ID = CODEC_IDS["raw"]
# A chunk is stored coded if that saves 1/128 of it: less is not worth the decoding.
_MIN_GAIN = 128
_SCRATCH = Scratch()


@dataclass(frozen=True, slots=True)
class PackedChunks:
    """The chunks of a block, packed.

    Attributes:
        slots: uint8 [n]: the chunks' slots, one behind the other.
        memory: the buffer that they lie in, to be given back; None where it was not taken from
            `Buffers`.
        records: RECORD [chunks].
        counts: [chunks, 256]: how often each symbol occurs in each chunk (codec `rans`), or in the
            sample of it (`sample_counts`).
        raw_bytes: int64 [chunks]: symbols of each.
        tables: packed frequency tables (codec `rans`), one for each place of each group; empty
            where no chunk uses it.
    """

    slots: NDArray[np.uint8]
    memory: NDArray[np.uint8] | None
    records: NDArray[Any]
    counts: NDArray[Any]
    raw_bytes: NDArray[np.int64]
    tables: list[bytes]


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """The result of a worker for one block.

    Attributes:
        chunks: its chunks; None where there is a problem.
        digested: the bytes that the tensor's digest covers: codes, or the source's bytes.
        memory: the buffer that they lie in, to be given back; None where it was not taken from
            `Buffers`.
        absmax: float32 [rows] of an int8 block whose scales were found here, else None.
        worst_error: worst absolute error (int8).
        worst_steps: worst error in steps (int8 under given steps).
        problem: why int8 cannot represent this block (`non_finite`, `tiny_scale`, `codes`), or not
            in one plane (`wide`), or None. If there is one, nothing else is valid.
        wide: whether the block's codes are in two planes, though its plan does not say so: it is
            all of its tensor.
    """

    chunks: PackedChunks | None
    digested: Any = b""
    memory: NDArray[np.uint8] | None = None
    absmax: NDArray[np.float32] | None = None
    worst_error: float = 0.0
    worst_steps: float = 0.0
    problem: str | None = None
    wide: bool = False


def pack_chunks(
    symbols: NDArray[np.uint8],
    raw_bytes: Sequence[int],
    codec: CodecName,
    *,
    places: int = 1,
    group: int | None = None,
    low_bits: Sequence[int] = (),
    buffers: Buffers | None = None,
) -> PackedChunks:
    """Packs the chunks of consecutive tiles.

    Args:
        symbols: uint8 [n], contiguous: those of one chunk behind those of the other.
        raw_bytes: symbols of each chunk, 1 or more.
        codec: `zstd` or `rans`; a chunk that it does not shrink is stored `raw`.
        places: chunks of a tile or, under given steps, of a row of tiles.
        group: chunks of a group, a multiple of `places`, the last may have fewer; None puts all
            into one. Chunks at the same place of a group share a frequency table (codec `rans`).
        low_bits: of each tile, where codes are wide: chunks are the low and the high plane by
            turns.
        buffers: has the memory for the slots; None takes new memory.
    """
    bits_of_chunks = [bits for tile_bits in low_bits for bits in (0, tile_bits)]
    sizes = np.array(raw_bytes, np.int64)
    frames = _frames(symbols, raw_bytes, bits_of_chunks) if codec == _ZSTD.name else None
    if native.core is None:
        return _pack_plainly(symbols, sizes, frames, (places, group or len(sizes)), bits_of_chunks)
    memory = (buffers or Buffers()).take(sum(map(slot_bytes, raw_bytes)))
    records = np.empty(len(sizes), RECORD)
    counts = np.empty((len(sizes), 256), np.uint32)
    is_rans = frames is None
    size, tables = native.core.pack_chunks(
        symbols,
        sizes,
        (places, group or len(sizes)),
        CODEC_IDS[codec],
        bytes(bits_of_chunks) if low_bits else None,
        frames,
        LOG2 if is_rans else None,
        (memory, records, counts),
        _SCRATCH.reserve("coded", STATE_BYTES + 2 * max(raw_bytes)) if is_rans else None,
    )
    return PackedChunks(memory[:size], memory, records, counts, sizes, tables)


def _frames(symbols: NDArray[np.uint8], raw_bytes: Sequence[int], low_bits: list[int]) -> list[Any]:
    """Returns the Zstandard frame of each chunk."""
    if not low_bits:
        return _ZSTD.encode_together(symbols, raw_bytes)
    # The slow strategy runs only where it can pay: above many low bits a plane is nearly constant.
    return [
        _ZSTD.encode_sparse(part) if bits >= SPARSE_LOW_BITS else _ZSTD.encode(part)
        for part, bits in zip(_parts(symbols, raw_bytes), low_bits, strict=True)
    ]


def _parts(symbols: NDArray[np.uint8], raw_bytes: Sequence[int]) -> list[NDArray[np.uint8]]:
    return np.split(symbols, np.cumsum(raw_bytes)[:-1])


def _pack_plainly(
    symbols: NDArray[np.uint8],
    raw_bytes: NDArray[np.int64],
    frames: list[Any] | None,
    groups: tuple[int, int],
    low_bits: list[int],
) -> PackedChunks:
    """As `pack_chunks`, without the native core; `frames` are None for codec `rans`."""
    parts = _parts(symbols, raw_bytes.tolist())
    if frames is None:
        counts, stored_chunks, tables = _code_with_rans(parts, *groups)
    else:
        counts, stored_chunks, tables = np.array(list(map(sample_counts, parts))), frames, []
    slots, fields = [], []
    for part, coded, bits in zip(parts, stored_chunks, low_bits or [0] * len(parts), strict=True):
        codec = RANS_ID if frames is None else _ZSTD.codec_id
        stored = b"" if coded is None else bytes(coded)
        if not stored or not _shrinks(len(stored), part.size):
            stored, codec = part.tobytes(), _RAW_ID
        slot = stored.ljust(slot_bytes(len(stored)), b"\0")
        fields.append((len(stored), codec, bits, (0, 0), xxh3(slot)))
        slots.append(slot)
    records = np.array(fields, RECORD)
    if tables:
        coded_chunks = np.flatnonzero(records["codec"] == RANS_ID).tolist()
        used = {_table_of(chunk, *groups) for chunk in coded_chunks}
        tables = [table if number in used else b"" for number, table in enumerate(tables)]
    all_slots = np.frombuffer(b"".join(slots), np.uint8)
    return PackedChunks(all_slots, None, records, counts, raw_bytes, tables)


def _table_of(chunk: int, places: int, group: int) -> int:
    return chunk // group * places + chunk % places


def _shrinks(stored_bytes: int, raw_bytes: int) -> bool:
    return stored_bytes < raw_bytes - raw_bytes // _MIN_GAIN


def _code_with_rans(
    parts: list[NDArray[np.uint8]], places: int, group: int
) -> tuple[NDArray[np.int64], list[bytes | None], list[bytes]]:
    """Returns counts of the chunks, coded bytes (None where they would not pay), and tables."""
    chunk_counts = list(map(symbol_counts, parts))
    counts = np.array(chunk_counts, np.int64)
    numbers = [_table_of(chunk, places, group) for chunk in range(len(parts))]
    totals = np.zeros((max(numbers) + 1, 256), np.int64)
    np.add.at(totals, numbers, counts)
    tables = list(map(fit_table, totals))
    fitted_tables = [tables[number] for number in numbers]
    # Decided by expected sizes: a chunk that would stay raw is never coded.
    worth = [
        _shrinks(coded_bytes(table, symbols), part.size)
        for table, symbols, part in zip(fitted_tables, counts, parts, strict=True)
    ]
    worth_parts = compress(parts, worth)
    worth_tables = compress(fitted_tables, worth)
    plain_chunks = list(map(rans.Uncoded, worth_parts, worth_tables))
    coded_chunks = iter(rans.encode_chunks(plain_chunks))
    stored_chunks = [next(coded_chunks) if pays else None for pays in worth]
    return counts, stored_chunks, list(map(pack_table, tables))
