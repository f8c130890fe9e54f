"""One block of a tensor -> encoded chunks. Runs in worker threads; everything it returns is complete and in order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.encode.planes import split_planes
from codecllm.converter.encode.quantize import (
    Quantized,
    RowScales,
    Words,
    column_absmax,
    count_non_finite,
    quantize_block,
    quantize_steps,
    row_absmax,
)
from codecllm.converter.encode.wide_codes import choose_low_bits, halves
from codecllm.converter.plan.policy import TensorPlan
from codecllm.converter.plan.steps import Steps
from codecllm.formats.checksums import xxh3
from codecllm.formats.codecs import CODEC_IDS, RANS_ID, rans
from codecllm.formats.codecs.rans_fit import coded_bytes, fit_table
from codecllm.formats.codecs.rans_table import FrequencyTable, pack_table
from codecllm.formats.codecs.zstd import SPARSE_LOW_BITS, ZstdCodec
from codecllm.formats.entropy import counted_entropy_bits, estimated_entropy_bits
from codecllm.formats.errors import UsageError
from codecllm.formats.schemes.int8 import (
    MAX_CODE,
    MAX_WIDE_CODE,
    MAX_WIDE_STEP,
    MIN_WIDE_CODE,
    channel_scales,
)
from codecllm.formats.shards.chunk_table import RECORD, slot_bytes
from codecllm.formats.tiling import Grid

BLOCK_ELEMENTS = 1 << 20
ONE_PASS_COLUMNS = 1 << 22
"""Longest row whose scale is found while it is in memory; a longer one is read twice."""

_ZSTD = ZstdCodec()
_RAW_ID = CODEC_IDS["raw"]
_MIN_GAIN = 128  # a chunk is stored coded only if that saves 1/128: less is not worth the time of decoding it


@dataclass(frozen=True, slots=True)
class Block:
    """A run of tiles that covers a rectangle of the matrix, contiguous in the source.

    Attributes:
        first: number of its first tile.
        last: number behind its last tile.
        row, col, rows, cols: the rectangle.
    """

    first: int
    last: int
    row: int
    col: int
    rows: int
    cols: int


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


def needs_scale_pass(plan: TensorPlan) -> bool:
    """Whether the scales of an int8 tensor must be known before its first block is quantized."""
    return (
        plan.scheme == "int8"
        and plan.steps is None
        and (plan.kind == "column" or plan.grid.cols > ONE_PASS_COLUMNS)
    )


def blocks_of(plan: TensorPlan) -> Iterator[Block]:
    """Cuts a coded tensor's tiles into blocks of about 1 Mi elements: whole rows, or pieces of one row where rows are huge."""
    grid = plan.grid
    tile_rows, tile_cols = block_extent(grid)
    if tile_cols < grid.across:
        yield from _pieces_of_rows(grid, tile_cols)
        return
    rows = tile_rows * grid.tile_rows
    for row in range(0, grid.rows, rows):
        count = min(rows, grid.rows - row)
        first = row // grid.tile_rows * grid.across
        last = -(-(row + count) // grid.tile_rows) * grid.across
        yield Block(first, last, row, 0, count, grid.cols)


def block_extent(grid: Grid) -> tuple[int, int]:
    """Returns how many tiles a block has one above the other and side by side. A block's chunks share their `rans` tables."""
    if grid.across > 1 and grid.cols > ONE_PASS_COLUMNS:
        return 1, min(grid.across, max(1, BLOCK_ELEMENTS // grid.tile_cols))
    return max(1, BLOCK_ELEMENTS // max(grid.cols, 1) // grid.tile_rows), max(1, grid.across)


def group_extent(plan: TensorPlan) -> tuple[int, int]:
    """Returns how many tiles share a `rans` table one above the other and side by side: a block's, or its like columns'."""
    down, across = block_extent(plan.grid)
    return down, across if plan.steps is None else 1


def _pieces_of_rows(grid: Grid, step: int) -> Iterator[Block]:
    for row in range(grid.rows):
        for tile in range(0, grid.across, step):
            last = min(tile + step, grid.across)
            col = tile * grid.tile_cols
            cols = min(last * grid.tile_cols, grid.cols) - col
            yield Block(row * grid.across + tile, row * grid.across + last, row, col, 1, cols)


class _ReadBuffer(threading.local):
    """One thread's buffer for source bytes; pages that are used again cost nothing."""

    def __init__(self) -> None:
        self.data = np.empty(0, np.uint8)

    def reserve(self, size: int) -> NDArray[np.uint8]:
        if self.data.size < size:
            self.data = np.empty(size, np.uint8)
        return self.data


_READ_BUFFER = _ReadBuffer()


def _read_block(plan: TensorPlan, block: Block) -> Words:
    """Reads the block's elements as unsigned [rows, cols] bit patterns, valid until this thread reads the next block."""
    start = block.row * plan.grid.cols + block.col
    count = block.rows * block.cols
    buffer = _READ_BUFFER.reserve(count * plan.source.dtype.itemsize)
    return plan.source.read_elements(start, start + count, buffer).reshape(block.rows, block.cols)


def scan_block(plan: TensorPlan, block: Block) -> RowScales:
    """First pass over a block: largest magnitude of each of its channels, in the block's columns or rows."""
    words = _read_block(plan, block)
    find = column_absmax if plan.kind == "column" else row_absmax
    return find(words, plan.source.dtype.name)


def count_block(plan: TensorPlan, block: Block) -> NDArray[np.int64]:
    """Returns int64 [rows]: non-finite weights in each row of the block."""
    return count_non_finite(_read_block(plan, block), plan.source.dtype.name)


def encode_block(
    plan: TensorPlan, block: Block, scales: NDArray[np.float32] | None
) -> EncodedBlock:
    """Reads, transforms and packs one block.

    Args:
        plan: the tensor's plan, `lossless` or `int8`.
        block: which part of it.
        scales: float32 [channels] of the whole tensor where they are known already; None finds them here, per row.
    """
    words = _read_block(plan, block)
    if plan.steps is not None:
        return _encode_steps(plan, plan.steps, block, words)
    if plan.scheme == "int8":
        return _encode_int8(plan, block, words, scales)
    flat = words.reshape(-1)
    tiles = _tile_slices(plan.grid, block)
    planes = (split_planes(flat[part], plan.source.dtype) for part in tiles)
    if plan.codec == "rans":
        # A plane of an 8-bit type is the read buffer itself, which this thread's next block overwrites.
        waiting, entropy = _prepare_rans([[np.array(plane) for plane in part] for part in planes])
        return EncodedBlock([], np.empty(0, RECORD), flat.tobytes(), entropy, waiting=waiting)
    slots, records, entropy = _pack_chunks(planes)
    return EncodedBlock(slots, records, flat.tobytes(), entropy)


def _encode_int8(
    plan: TensorPlan, block: Block, words: Words, scales: NDArray[np.float32] | None
) -> EncodedBlock:
    dtype = plan.source.dtype.name
    absmax = None
    if scales is None:
        found = row_absmax(words, dtype)
        if not found.finite or found.tiny:
            problem = "tiny_scale" if found.finite else "non_finite"
            return EncodedBlock([], np.empty(0, RECORD), b"", [], problem=problem)
        absmax = found.absmax
        factors = channel_scales(absmax)[:, None]
    elif plan.kind == "column":
        factors = scales[None, block.col : block.col + block.cols]
    else:
        factors = scales[block.row : block.row + block.rows, None]
    codes = np.empty(words.shape, np.int8)
    worst = quantize_block(words, dtype, factors, codes)
    flat = codes.reshape(-1).view(np.uint8)
    planes = ([flat[part]] for part in _tile_slices(plan.grid, block))
    if plan.codec == "rans":
        waiting, entropy = _prepare_rans(list(planes))
        return EncodedBlock([], np.empty(0, RECORD), flat, entropy, absmax, worst, waiting=waiting)
    slots, records, entropy = _pack_chunks(planes)
    return EncodedBlock(slots, records, flat, entropy, absmax, worst)


def _encode_steps(plan: TensorPlan, steps: Steps, block: Block, words: Words) -> EncodedBlock:
    """Quantizes a block under given steps and packs it tile by tile, like columns together."""
    factors = None if steps.col_scale is None else steps.col_scale[None, :]
    rows = (
        steps.row_scale[None, :]
        if plan.kind == "column"
        else steps.row_scale[block.row : block.row + block.rows, None]
    )
    if steps.codes is None:
        codes = np.empty(words.shape, np.int16)
    else:
        codes = steps.codes(block.row, block.row + block.rows)
        if codes.shape != words.shape or codes.dtype != np.int16:
            got, expected = f"{codes.dtype} {list(codes.shape)}", f"int16 {list(words.shape)}"
            raise UsageError(
                "refined codes have a wrong type or shape",
                tensor=plan.source.name,
                got=got,
                expected=expected,
            )
    given = steps.codes is not None
    found = quantize_steps(
        words, plan.source.dtype.name, (rows, factors), codes, given, steps.deadzone
    )
    problem = _problem(found, plan, steps, block)
    if problem is not None:
        return EncodedBlock([], np.empty(0, RECORD), b"", [], problem=problem)
    wide = plan.wide or max(-found.lowest, found.highest) > MAX_CODE
    bands = _column_tiles(plan.grid, steps, block, codes)
    low_bits: list[int] = []
    if wide:
        whole = list(bands)
        low_bits = choose_low_bits(whole, plan.codec)
        bits_of = iter(low_bits)
        groups = ([half for tile in band for half in halves(tile, next(bits_of))] for band in whole)
    else:
        groups = (
            [tile.astype(np.int8).reshape(-1).view(np.uint8) for tile in band] for band in bands
        )
    digested = codes.astype("<i2" if wide else np.int8).reshape(-1).view(np.uint8)
    facts: dict[str, Any] = {
        "worst_error": found.worst_error,
        "worst_steps": found.worst_steps,
        "wide": wide and not plan.wide,
    }
    planes = 2 if wide else 1
    if plan.codec == "rans":
        waiting, parts = _prepare_rans(list(groups), low_bits)
        return EncodedBlock(
            [], np.empty(0, RECORD), digested, _per_plane(parts, planes), waiting=waiting, **facts
        )
    slots, records, parts = _pack_chunks(groups, low_bits)
    return EncodedBlock(slots, records, digested, _per_plane(parts, planes), **facts)


def _problem(found: Quantized, plan: TensorPlan, steps: Steps, block: Block) -> str | None:
    """Returns why the codes of a block cannot be packed as the plan says."""
    if not found.finite:
        return "non_finite"
    if not (found.lowest >= MIN_WIDE_CODE and found.highest <= MAX_WIDE_CODE):
        return "codes"
    narrow = found.lowest >= -MAX_CODE and found.highest <= MAX_CODE
    if narrow and not plan.wide:
        return None
    if steps.largest > MAX_WIDE_STEP:
        return "codes"
    return None if plan.wide or block.last - block.first == len(plan.grid) else "wide"


def _column_tiles(
    grid: Grid, steps: Steps, block: Block, codes: NDArray[np.int16]
) -> Iterator[list[NDArray[np.int16]]]:
    """Yields, for each row of tiles of a block, the codes of its tiles one after another, columns in the stored order."""
    order = steps.order
    for row in range(0, block.rows, grid.tile_rows):
        band, tiles = codes[row : row + grid.tile_rows], []
        for col in range(0, grid.cols, grid.tile_cols):
            cols = slice(col, col + grid.tile_cols)
            tiles.append(
                band[:, cols] if order is None else band.take(order[cols], axis=1, mode="clip")
            )
        yield tiles


def _per_plane(parts: list[float], planes: int) -> list[float]:
    """Adds up figures of the tiles side by side, plane by plane."""
    return [sum(parts[plane::planes]) for plane in range(planes)]


def _tile_slices(grid: Grid, block: Block) -> list[slice]:
    """Where each tile of the block lies in the block's elements; tiles follow one another, as the default grid's do."""
    slices, position = [], 0
    for index in range(block.first, block.last):
        symbols = grid.tile(index).symbols
        slices.append(slice(position, position + symbols))
        position += symbols
    return slices


def _pack_chunks(
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


def _prepare_rans(
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
