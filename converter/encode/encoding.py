"""One block of a tensor -> an encoded block. Runs in worker threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.encode.blocks import Block, group_tiles, tile_sizes
from codecllm.converter.encode.buffers import Buffers, Scratch
from codecllm.converter.encode.packing import EncodedBlock, pack_chunks
from codecllm.converter.encode.planes import split_tiles
from codecllm.converter.encode.quantize import (
    Quantized,
    RowScales,
    Words,
    column_absmax,
    count_non_finite,
    quantize_block,
    quantize_steps,
    quantize_stored_rows,
    row_absmax,
)
from codecllm.converter.encode.wide_codes import choose_low_bits, halves
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.formats.dtypes import DType
from codecllm.formats.errors import UsageError
from codecllm.formats.schemes.int8 import (
    MAX_CODE,
    MAX_WIDE_CODE,
    MAX_WIDE_STEP,
    MIN_WIDE_CODE,
)
from codecllm.formats.tiling import Grid

_SCRATCH = Scratch()
_CACHED_BYTES = 1 << 18  # of rows that are read and quantized at a time


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
        buffer = _SCRATCH.reserve("words", count * plan.source.dtype.itemsize)
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
    plan: TensorPlan,
    block: Block,
    scales: NDArray[np.float32] | None,
    buffers: Buffers | None = None,
) -> EncodedBlock:
    """Reads, transforms and packs one block, or a run of blocks.

    Args:
        plan: the tensor's plan, `lossless` or `int8`.
        block: which part of it.
        scales: float32 [channels] of the whole tensor where they are known already; None finds them
            here, per row.
        buffers: have the memory for the result; None takes new memory.
    """
    buffers = buffers or Buffers()
    if plan.scheme == "lossless":
        return _encode_lossless(plan, block, buffers)
    if plan.params is not None:
        return _encode_with_params(plan, plan.params, block, buffers)
    return _encode_int8(plan, block, scales, buffers)


def _encode_lossless(plan: TensorPlan, block: Block, buffers: Buffers) -> EncodedBlock:
    dtype, grid = plan.source.dtype, plan.grid
    count = block.rows * block.cols
    # The digest keeps the memory that is read into.
    memory = buffers.take(count * dtype.itemsize)
    flat = _read_block(plan, block, memory).reshape(-1)
    sizes = tile_sizes(grid, block)
    symbols = _split_block(flat, dtype, sizes[0], block)
    chunks = pack_chunks(
        symbols,
        [size for size in sizes for _ in range(dtype.planes)],
        plan.codec,
        places=dtype.planes,
        group=group_tiles(grid) * dtype.planes,
        buffers=buffers,
    )
    return EncodedBlock(chunks, memory[: flat.nbytes], memory)


def _split_block(
    flat: NDArray[np.unsignedinteger], dtype: DType, tile: int, block: Block
) -> NDArray[np.uint8]:
    """Splits the tiles of a block into planes.

    The last tile of a long row is smaller, and another row may follow it: then each row is split
    for itself.
    """
    symbols = _SCRATCH.reserve("symbols", flat.nbytes)
    if tile >= block.cols or dtype.bits == 8:  # a byte is its own plane
        return split_tiles(flat, dtype, tile, symbols)
    rows = flat.reshape(block.rows, block.cols)
    for row, place in zip(rows, symbols.reshape(block.rows, -1), strict=True):
        split_tiles(row, dtype, tile, place)
    return symbols


def _encode_int8(
    plan: TensorPlan, block: Block, scales: NDArray[np.float32] | None, buffers: Buffers
) -> EncodedBlock:
    source, grid = plan.source, plan.grid
    absmax = None
    memory = buffers.take(block.rows * block.cols)
    flat = memory[: block.rows * block.cols]
    codes = flat.view(np.int8).reshape(block.rows, block.cols)
    if scales is None:
        first = block.row * grid.cols + block.col
        row_bytes = block.cols * source.dtype.itemsize
        absmax, worst, problem = quantize_stored_rows(
            source, first, codes, _SCRATCH.reserve("rows", max(_CACHED_BYTES, row_bytes))
        )
        # The writer decides: not this block alone but the whole tensor changes its scheme.
        if problem is not None:
            return EncodedBlock(None, problem=problem)
    else:
        factors = scales[block.row : block.row + block.rows, None]
        if plan.kind == "column":
            factors = scales[None, block.col : block.col + block.cols]
        worst = quantize_block(_read_block(plan, block), source.dtype.name, factors, codes)
    chunks = pack_chunks(
        flat,
        tile_sizes(grid, block),
        plan.codec,
        group=group_tiles(grid),
        buffers=buffers,
    )
    return EncodedBlock(chunks, flat, memory, absmax, worst)


def _encode_with_params(
    plan: TensorPlan, params: QuantParams, block: Block, buffers: Buffers
) -> EncodedBlock:
    """Quantizes a block under given steps and packs it tile by tile, like columns together."""
    words = _read_block(plan, block)
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
        return EncodedBlock(None, problem=problem)
    wide = plan.wide or max(-result.lowest, result.highest) > MAX_CODE
    bands = list(_column_tiles(plan.grid, params, block, codes))
    low_bits: list[int] = []
    if wide:
        low_bits = choose_low_bits(bands, plan.codec)
        bits_of = iter(low_bits)
        parts = [half for band in bands for tile in band for half in halves(tile, next(bits_of))]
    else:
        parts = [tile.astype(np.int8).reshape(-1).view(np.uint8) for band in bands for tile in band]
    chunks = pack_chunks(
        np.concatenate(parts),
        [part.size for part in parts],
        plan.codec,
        places=len(parts) // len(bands),
        low_bits=low_bits,
        buffers=buffers,
    )
    return EncodedBlock(
        chunks,
        codes.astype("<i2" if wide else np.int8).reshape(-1).view(np.uint8),
        worst_error=result.worst_error,
        worst_steps=result.worst_steps,
        wide=wide and not plan.wide,
    )


def _problem(
    quantized: Quantized, plan: TensorPlan, params: QuantParams, block: Block
) -> str | None:
    """Returns why the codes of a block cannot be packed as the plan says."""
    if not quantized.finite:
        return "non_finite"
    if not (quantized.lowest >= MIN_WIDE_CODE and quantized.highest <= MAX_WIDE_CODE):
        return "codes"
    if quantized.overflows:
        return "overflow"
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
