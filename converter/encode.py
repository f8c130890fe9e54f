"""One block of a tensor -> encoded chunks. Runs in worker threads; everything it returns is complete and in order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.planes import split_planes
from codecllm.converter.policy import TensorPlan
from codecllm.converter.quantize import (
    RowScales,
    Words,
    column_absmax,
    count_non_finite,
    quantize_block,
    row_absmax,
)
from codecllm.formats.checksums import xxh3
from codecllm.formats.chunk_table import RECORD, slot_bytes
from codecllm.formats.codecs import CODEC_IDS, CODECS
from codecllm.formats.entropy import estimated_entropy_bits
from codecllm.formats.schemes.int8 import channel_scales
from codecllm.formats.tiling import Grid

BLOCK_ELEMENTS = 1 << 20
ONE_PASS_COLUMNS = 1 << 22
"""Longest row whose scale is found while it is in memory; a longer one is read twice."""

_ZSTD = CODECS[CODEC_IDS["zstd"]]
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
        problem: why int8 cannot represent this block (`non_finite` or `tiny_scale`), or None. Then nothing else is valid.
    """

    slots: list[Any]
    records: NDArray[Any]
    digested: Any
    entropy_bits: list[float]
    absmax: NDArray[np.float32] | None = None
    worst_error: float = 0.0
    problem: str | None = None


def needs_scale_pass(plan: TensorPlan) -> bool:
    """Whether the scales of an int8 tensor must be known before its first block is quantized."""
    return plan.scheme == "int8" and (plan.kind == "column" or plan.grid.cols > ONE_PASS_COLUMNS)


def blocks_of(plan: TensorPlan) -> Iterator[Block]:
    """Cuts a coded tensor's tiles into blocks of about 1 Mi elements: whole rows, or pieces of one row where rows are huge."""
    grid = plan.grid
    if grid.across > 1 and grid.cols > ONE_PASS_COLUMNS:
        yield from _pieces_of_rows(grid)
        return
    rows = max(grid.tile_rows, BLOCK_ELEMENTS // max(grid.cols, 1) // grid.tile_rows * grid.tile_rows)
    for row in range(0, grid.rows, rows):
        count = min(rows, grid.rows - row)
        first = row // grid.tile_rows * grid.across
        last = -(-(row + count) // grid.tile_rows) * grid.across
        yield Block(first, last, row, 0, count, grid.cols)


def _pieces_of_rows(grid: Grid) -> Iterator[Block]:
    step = max(1, BLOCK_ELEMENTS // grid.tile_cols)
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


def encode_block(plan: TensorPlan, block: Block, scales: NDArray[np.float32] | None) -> EncodedBlock:
    """Reads, transforms and packs one block.

    Args:
        plan: the tensor's plan, `lossless` or `int8`.
        block: which part of it.
        scales: float32 [channels] of the whole tensor where they are known already; None finds them here, per row.
    """
    words = _read_block(plan, block)
    if plan.scheme == "int8":
        return _encode_int8(plan, block, words, scales)
    flat = words.reshape(-1)
    tiles = _tile_slices(plan.grid, block)
    slots, records, entropy = _pack_chunks(split_planes(flat[part], plan.source.dtype) for part in tiles)
    return EncodedBlock(slots, records, flat.tobytes(), entropy)


def _encode_int8(plan: TensorPlan, block: Block, words: Words, scales: NDArray[np.float32] | None) -> EncodedBlock:
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
    slots, records, entropy = _pack_chunks([flat[part]] for part in _tile_slices(plan.grid, block))
    return EncodedBlock(slots, records, flat, entropy, absmax, worst)


def _tile_slices(grid: Grid, block: Block) -> list[slice]:
    """Where each tile of the block lies in the block's elements; tiles follow one another, as the default grid's do."""
    slices, position = [], 0
    for index in range(block.first, block.last):
        symbols = grid.tile(index).symbols
        slices.append(slice(position, position + symbols))
        position += symbols
    return slices


def _pack_chunks(
    planes_of: Iterable[list[NDArray[np.uint8]]],
) -> tuple[list[Any], NDArray[Any], list[float]]:
    """Packs the planes of consecutive tiles; returns slots, records and the entropy estimate of each plane."""
    slots, fields = [], []
    entropy: list[float] = []
    for planes in planes_of:
        entropy = entropy or [0.0] * len(planes)
        for plane, symbols in enumerate(planes):
            slot, stored_bytes, codec = _pack_chunk(symbols)
            slots.append(slot)
            fields.append((stored_bytes, codec, (0, 0, 0), xxh3(slot)))
            entropy[plane] += estimated_entropy_bits(symbols)
    return slots, np.array(fields, RECORD), entropy


def _pack_chunk(symbols: NDArray[np.uint8]) -> tuple[Any, int, int]:
    """Returns a chunk's slot, its stored bytes without padding, and the codec's id."""
    stored: Any = _ZSTD.encode(symbols)
    codec = _ZSTD.codec_id
    if len(stored) >= symbols.size - symbols.size // _MIN_GAIN:
        stored, codec = symbols.tobytes(), _RAW_ID
    size = len(stored)
    return stored.ljust(slot_bytes(size), b"\0"), size, codec
