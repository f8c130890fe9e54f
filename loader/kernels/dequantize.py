"""Turns the codes of scheme `int8` into weights on a GPU.

The bits are those of `formats.schemes.int8.dequantize`, rounded as in `float_bits`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from codecllm.formats.tiling import ChannelKind, Grid
from codecllm.loader.kernels.on_device import on_device_of
from codecllm.loader.kernels.tiles import WARPS, check_plane, cut_blocks, find_block

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dequantize_int8(
    low: torch.Tensor,
    high: torch.Tensor | None,
    low_bits: torch.Tensor | None,
    grid: Grid,
    row_scale: torch.Tensor,
    col_scale: torch.Tensor | None,
    col_order: torch.Tensor | None,
    kind: ChannelKind,
    out: torch.Tensor,
) -> None:
    """Writes weights from codes.

        code = low, or low + 2**low_bits * high
        step = row_scale[r], col_scale[c] or fl32(row_scale[r] * col_scale[c])
        weight = cast(fl32(code * step))

    One product, rounded to float32, then one rounding to the output's type, ties to even: nothing
    is added to a product, so no compiler can fuse it. Each code is read and each weight written
    once: 3 bytes an element for bf16 over the memory bandwidth is the floor. With an order of
    columns a row's codes are gathered, from the first-level cache. Nothing is synchronized.

    Args:
        low: uint8 [rows * cols]: the codes, int8, in the order of the tiles; of wide codes the low
            part.
        high: uint8 [rows * cols]: the high part of wide codes, int8, else None.
        low_bits: int32 [tiles], where `high` is given: how many bits of its codes the low part of
            each tile holds.
        grid: the tiles.
        row_scale: float32, one per channel: [rows], or [cols] if `kind` is `column`.
        col_scale: float32 [cols] in the source's order, or None; only if `kind` is `row`.
        col_order: int32 [cols], a permutation: stored column j is the source's column col_order[j];
            or None.
        kind: kind of the channel.
        out: bfloat16, float16 or float32 [rows, cols], contiguous, on the device of all others.

    Raises:
        ValueError: a tensor does not fit: a mistake of the caller.
    """
    for plane in (low, high):
        if plane is not None:
            check_plane(plane, grid, out)
    channels = grid.rows if kind == "row" else grid.cols
    wanted = [
        (row_scale, channels),
        (col_scale, grid.cols),
        (col_order, grid.cols),
        (low_bits, len(grid)),
    ]
    if out.dtype not in _DTYPES or any(
        tensor is not None and tensor.numel() != size for tensor, size in wanted
    ):
        raise ValueError(f"scales or output do not fit {grid}")
    if (high is None) != (low_bits is None):
        raise ValueError("codes have both a high part and low_bits, or neither")
    if kind == "column" and col_scale is not None:
        raise ValueError("columns that are channels have one scale each")
    _launch(low, high, low_bits, grid, row_scale, col_scale, col_order, kind, out)


def untile_codes(
    low: torch.Tensor, grid: Grid, out: torch.Tensor, col_order: torch.Tensor | None = None
) -> None:
    """Writes int8 [rows, cols] codes from uint8 [rows * cols] in the order of the tiles.

    Raises:
        ValueError: a tensor does not fit: a mistake of the caller.
    """
    check_plane(low, grid, out)
    if out.dtype != torch.int8 or (col_order is not None and col_order.numel() != grid.cols):
        raise ValueError(f"output or order do not fit {grid}")
    _launch(low, None, None, grid, None, None, col_order, "row", out)


def _launch(
    low: torch.Tensor,
    high: torch.Tensor | None,
    low_bits: torch.Tensor | None,
    grid: Grid,
    row_scale: torch.Tensor | None,
    col_scale: torch.Tensor | None,
    col_order: torch.Tensor | None,
    kind: ChannelKind,
    out: torch.Tensor,
) -> None:
    if kind == "column":
        row_scale, col_scale = None, row_scale
    places = None
    if col_order is not None:
        # A gather per element of the output: writes stay in a row.
        places = torch.empty_like(col_order)
        places[col_order.long()] = torch.arange(
            len(col_order), dtype=torch.int32, device=col_order.device
        )
    blocks = cut_blocks(grid, across_tiles=places is not None)
    if not blocks.count:
        return
    rounds = out.dtype == torch.bfloat16 and not _rounds_bfloat16(out.device)
    with on_device_of(out):
        _dequantize_kernel[(blocks.count,)](
            low,
            low if high is None else high,
            low if low_bits is None else low_bits,
            low if row_scale is None else row_scale,
            low if col_scale is None else col_scale,
            low if places is None else places,
            out.view(torch.int16) if rounds else out,
            *blocks.geometry,
            grid.tile_rows,
            grid.tile_cols,
            grid.across,
            WIDE_CODES=high is not None,
            BY_ROW=row_scale is not None,
            BY_COL=col_scale is not None,
            MOVED=places is not None,
            ROUNDS=rounds,
            ONE_TILE=blocks.one_tile,
            BLOCK_ROWS=blocks.block_rows,
            BLOCK_COLS=blocks.block_cols,
            num_warps=WARPS,
        )


def _rounds_bfloat16(device: torch.device) -> bool:
    """Whether hardware rounds a conversion to bfloat16; Triton's interpreter truncates."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@triton.jit
def _round_to_bfloat16(values):
    """Rounds float32 to bfloat16 in integers, ties to even; returns int16 bits; not for NaN."""
    bits = values.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _dequantize_kernel(
    low,
    high,
    low_bits,
    row_scale,
    col_scale,
    places,
    out,
    rows,
    cols,
    tile_rows,
    tile_cols,
    across,
    tall,
    wide,
    stored_tile_rows,
    stored_tile_cols,
    stored_across,
    WIDE_CODES: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_COL: tl.constexpr,
    MOVED: tl.constexpr,
    ROUNDS: tl.constexpr,
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
    stored = col.to(tl.int32) + along
    if MOVED:
        # Blocks were cut as if tiles were rows as wide as the matrix; which tile holds an element
        # depends on its column.
        tile_row = row // stored_tile_rows * stored_tile_rows
        tile_height = tl.minimum(rows - tile_row, stored_tile_rows)
        stored = tl.load(places + col + along, mask=along < breadth, other=0)
        begin = stored // stored_tile_cols * stored_tile_cols
        own_width = tl.minimum(cols - begin, stored_tile_cols)
        place = tile_row * cols
        index = tile_height * begin + (stored - begin) + (row - tile_row + down) * own_width
    code = tl.load(low + place + index, mask=inside, other=0).to(tl.int8, bitcast=True)
    if BY_ROW or BY_COL:
        value = code.to(tl.float32)
        if WIDE_CODES:
            # Blocks may span tiles that follow each other in the source's order: each element looks
            # its own up.
            above = (row + down) // stored_tile_rows * stored_across
            bits = tl.load(low_bits + above + stored // stored_tile_cols, mask=inside, other=0)
            rest = (
                tl.load(high + place + index, mask=inside, other=0)
                .to(tl.int8, bitcast=True)
                .to(tl.int32)
            )
            value = ((rest << bits) + code).to(tl.float32)
        if BY_ROW:
            step = tl.load(row_scale + row + down, mask=down < height, other=0.0)
            if BY_COL:
                step = step * tl.load(col_scale + col + along, mask=along < breadth, other=0.0)
        else:
            step = tl.load(col_scale + col + along, mask=along < breadth, other=0.0)
        value = value * step
        word = _round_to_bfloat16(value) if ROUNDS else value.to(out.dtype.element_ty)
    else:
        word = code
    tl.store(out + (row * cols + col) + down * cols + along, word, mask=inside)
