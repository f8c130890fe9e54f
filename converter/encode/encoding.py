"""One block of a tensor -> an encoded block. Runs in worker threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.encode.blocks import Block, tile_slices
from codecllm.converter.encode.packing import EncodedBlock, pack_chunks
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
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.formats.errors import UsageError
from codecllm.formats.schemes.int8 import (
    MAX_CODE,
    MAX_WIDE_CODE,
    MAX_WIDE_STEP,
    MIN_WIDE_CODE,
    channel_scales,
)
from codecllm.formats.shards.chunk_table import RECORD
from codecllm.formats.tiling import Grid


class _ReadBuffer(threading.local):
    """One thread's buffer for source bytes; pages that are used again cost nothing."""

    def __init__(self) -> None:
        self.data = np.empty(0, np.uint8)

    def reserve(self, size: int) -> NDArray[np.uint8]:
        if self.data.size < size:
            self.data = np.empty(size, np.uint8)
        return self.data


_READ_BUFFER = _ReadBuffer()


def _read_block(plan: TensorPlan, block: Block, buffer: NDArray[np.uint8] | None = None) -> Words:
    """Reads the block's elements as unsigned [rows, cols] bit patterns.

    Args:
        plan: the tensor's plan.
        block: which part of it.
        buffer: uint8 memory of the block's size; None takes this thread's, which its next call
            overwrites.
    """
    start = block.row * plan.grid.cols + block.col
    count = block.rows * block.cols
    if buffer is None:
        buffer = _READ_BUFFER.reserve(count * plan.source.dtype.itemsize)
    return plan.source.read_elements(start, start + count, buffer).reshape(block.rows, block.cols)


def scan_block(plan: TensorPlan, block: Block) -> RowScales:
    """First pass over a block: the largest magnitude of each channel."""
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
        scales: float32 [channels] of the whole tensor where they are known already; None finds them
            here, per row.
    """
    if plan.scheme == "lossless":
        return _encode_lossless(plan, block)
    words = _read_block(plan, block)
    if plan.params is not None:
        return _encode_with_params(plan, plan.params, block, words)
    return _encode_int8(plan, block, words, scales)


def _encode_lossless(plan: TensorPlan, block: Block) -> EncodedBlock:
    dtype = plan.source.dtype
    # The digest, and planes of types of one byte, keep the memory that is read into: it is not used
    # again.
    buffer = np.empty(block.rows * block.cols * dtype.itemsize, np.uint8)
    flat = _read_block(plan, block, buffer).reshape(-1)
    planes = [split_planes(flat[part], dtype) for part in tile_slices(plan.grid, block)]
    packed_chunks = pack_chunks(planes, plan.codec)
    return EncodedBlock(
        packed_chunks.slots,
        packed_chunks.records,
        buffer,
        packed_chunks.entropy_bits,
        tables=packed_chunks.tables,
    )


def _encode_int8(
    plan: TensorPlan, block: Block, words: Words, scales: NDArray[np.float32] | None
) -> EncodedBlock:
    dtype = plan.source.dtype.name
    absmax = None
    if scales is None:
        measured_rows = row_absmax(words, dtype)
        # The writer decides: not this block alone but the whole tensor changes its scheme.
        if not measured_rows.finite or measured_rows.tiny:
            problem = "tiny_scale" if measured_rows.finite else "non_finite"
            return EncodedBlock([], np.empty(0, RECORD), b"", [], problem=problem)
        absmax = measured_rows.absmax
        factors = channel_scales(absmax)[:, None]
    elif plan.kind == "column":
        factors = scales[None, block.col : block.col + block.cols]
    else:
        factors = scales[block.row : block.row + block.rows, None]
    codes = np.empty(words.shape, np.int8)
    worst = quantize_block(words, dtype, factors, codes)
    flat = codes.reshape(-1).view(np.uint8)
    packed_chunks = pack_chunks(
        [[flat[part]] for part in tile_slices(plan.grid, block)], plan.codec
    )
    return EncodedBlock(
        packed_chunks.slots,
        packed_chunks.records,
        flat,
        packed_chunks.entropy_bits,
        absmax,
        worst,
        tables=packed_chunks.tables,
    )


def _encode_with_params(
    plan: TensorPlan, params: QuantParams, block: Block, words: Words
) -> EncodedBlock:
    """Quantizes a block under given steps and packs it tile by tile, like columns together."""
    factors = None if params.col_scale is None else params.col_scale[None, :]
    rows = (
        params.row_scale[None, :]
        if plan.kind == "column"
        else params.row_scale[block.row : block.row + block.rows, None]
    )
    if params.codes is None:
        codes = np.empty(words.shape, np.int16)
    else:
        codes = params.codes(block.row, block.row + block.rows)
        if codes.shape != words.shape or codes.dtype != np.int16:
            got, expected = f"{codes.dtype} {list(codes.shape)}", f"int16 {list(words.shape)}"
            raise UsageError(
                "refined codes have a wrong type or shape",
                tensor=plan.source.name,
                got=got,
                expected=expected,
            )
    has_codes = params.codes is not None
    result = quantize_steps(
        words, plan.source.dtype.name, (rows, factors), codes, has_codes, params.deadzone
    )
    problem = _problem(result, plan, params, block)
    if problem is not None:
        return EncodedBlock([], np.empty(0, RECORD), b"", [], problem=problem)
    wide = plan.wide or max(-result.lowest, result.highest) > MAX_CODE
    bands = _column_tiles(plan.grid, params, block, codes)
    low_bits: list[int] = []
    if wide:
        whole = list(bands)
        low_bits = choose_low_bits(whole, plan.codec)
        bits_of = iter(low_bits)
        groups = [[half for tile in band for half in halves(tile, next(bits_of))] for band in whole]
    else:
        groups = [
            [tile.astype(np.int8).reshape(-1).view(np.uint8) for tile in band] for band in bands
        ]
    packed_chunks = pack_chunks(groups, plan.codec, low_bits)
    return EncodedBlock(
        packed_chunks.slots,
        packed_chunks.records,
        codes.astype("<i2" if wide else np.int8).reshape(-1).view(np.uint8),
        _per_plane(packed_chunks.entropy_bits, 2 if wide else 1),
        worst_error=result.worst_error,
        worst_steps=result.worst_steps,
        wide=wide and not plan.wide,
        tables=packed_chunks.tables,
    )


def _problem(
    quantized: Quantized, plan: TensorPlan, params: QuantParams, block: Block
) -> str | None:
    """Returns why the codes of a block cannot be packed as the plan says."""
    if not quantized.finite:
        return "non_finite"
    if not (quantized.lowest >= MIN_WIDE_CODE and quantized.highest <= MAX_WIDE_CODE):
        return "codes"
    narrow = quantized.lowest >= -MAX_CODE and quantized.highest <= MAX_CODE
    if narrow and not plan.wide:
        return None
    if params.largest > MAX_WIDE_STEP:
        return "codes"
    # A tensor of one block turns wide on the spot. Earlier blocks of a longer one are packed in one
    # plane already, so it has to begin anew.
    return None if plan.wide or block.last - block.first == len(plan.grid) else "wide"


def _column_tiles(
    grid: Grid, params: QuantParams, block: Block, codes: NDArray[np.int16]
) -> Iterator[list[NDArray[np.int16]]]:
    """Yields the codes of the tiles of each row of tiles, columns in the stored order."""
    order = params.order
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
