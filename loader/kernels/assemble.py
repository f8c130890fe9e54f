"""Joins the byte planes of scheme `lossless` on a GPU, in integers.

The bits are those of `formats.schemes.lossless.join_planes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from codecllm.formats.dtypes import DType
from codecllm.formats.tiling import Grid
from codecllm.loader.kernels.on_device import on_device_of
from codecllm.loader.kernels.tiles import WARPS, check_plane, cut_blocks, find_block

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def can_assemble(dtype: DType) -> bool:
    """Whether `assemble_lossless` takes a type: all of `lossless` but BOOL, which needs a check."""
    return dtype.planes > 0 and dtype.name != "BOOL"


def assemble_lossless(
    planes: Sequence[torch.Tensor], grid: Grid, dtype: DType, out: torch.Tensor
) -> None:
    """Writes elements from their planes.

        word = sum over k of plane_k << (bits - 8 * (k + 1))
        where the type rotates: word >> 1 | word << (bits - 1)

    Each symbol is read and each element written once: with n bytes an element, 2 * n bytes over the
    memory bandwidth is the floor. Nothing is synchronized.

    Args:
        planes: `dtype.planes` uint8 [rows * cols], on one device, in the order of the tiles.
        grid: the tiles.
        dtype: element type; see `can_assemble`.
        out: [rows, cols] of an element type of that size, contiguous, on the device.

    Raises:
        ValueError: a tensor does not fit: a mistake of the caller.
    """
    if (
        not can_assemble(dtype)
        or len(planes) != dtype.planes
        or out.element_size() != dtype.itemsize
    ):
        raise ValueError(f"cannot assemble {dtype.name} in {out.dtype} from {len(planes)} planes")
    for plane in planes:
        check_plane(plane, grid, out)
    blocks = cut_blocks(grid, as_line=True)
    if blocks.count:
        sources = [planes[min(number, len(planes) - 1)] for number in range(8)]
        words = out.view(_WORDS[dtype.itemsize])
        with on_device_of(out):
            _assemble_kernel[(blocks.count,)](
                *sources,
                words,
                *blocks.geometry,
                PLANES=dtype.planes,
                ROTATES=dtype.rotates,
                ONE_TILE=blocks.one_tile,
                BLOCK_ROWS=blocks.block_rows,
                BLOCK_COLS=blocks.block_cols,
                num_warps=WARPS,
            )


@triton.jit
def _assemble_kernel(
    p0,
    p1,
    p2,
    p3,
    p4,
    p5,
    p6,
    p7,
    out,
    rows,
    cols,
    tile_rows,
    tile_cols,
    across,
    tall,
    wide,
    PLANES: tl.constexpr,
    ROTATES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    place, width, row, col, height, breadth = find_block(
        rows, cols, tile_rows, tile_cols, across, tall, wide, ONE_TILE, BLOCK_ROWS, BLOCK_COLS
    )
    down = tl.arange(0, BLOCK_ROWS)[:, None]
    along = tl.arange(0, BLOCK_COLS)[None, :]
    inside = (down < height) & (along < breadth)
    index = down * width + along
    if PLANES == 1:
        word = tl.load(p0 + place + index, mask=inside)
    elif PLANES == 2:
        word = tl.load(p0 + place + index, mask=inside).to(tl.uint16) << 8
        word |= tl.load(p1 + place + index, mask=inside).to(tl.uint16)
    elif PLANES == 4:
        word = tl.load(p0 + place + index, mask=inside).to(tl.uint32) << 24
        word |= tl.load(p1 + place + index, mask=inside).to(tl.uint32) << 16
        word |= tl.load(p2 + place + index, mask=inside).to(tl.uint32) << 8
        word |= tl.load(p3 + place + index, mask=inside).to(tl.uint32)
    else:
        word = tl.load(p0 + place + index, mask=inside).to(tl.uint64) << 56
        word |= tl.load(p1 + place + index, mask=inside).to(tl.uint64) << 48
        word |= tl.load(p2 + place + index, mask=inside).to(tl.uint64) << 40
        word |= tl.load(p3 + place + index, mask=inside).to(tl.uint64) << 32
        word |= tl.load(p4 + place + index, mask=inside).to(tl.uint64) << 24
        word |= tl.load(p5 + place + index, mask=inside).to(tl.uint64) << 16
        word |= tl.load(p6 + place + index, mask=inside).to(tl.uint64) << 8
        word |= tl.load(p7 + place + index, mask=inside).to(tl.uint64)
    if ROTATES:
        word = (word >> 1) | (word << (8 * PLANES - 1))
    tl.store(
        out + (row * cols + col) + down * cols + along,
        word.to(out.dtype.element_ty, bitcast=True),
        mask=inside,
    )
