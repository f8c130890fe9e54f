"""Cuts the work of the kernels that turn symbols into elements: blocks of one tile each.

No element then needs a division.

Symbols of a plane lie in the order of the tiles: tile (i, j) of a `Grid` begins at i * tile_rows *
cols + height * j * tile_cols, where height is the number of its rows, and stands there row by row.
Elements lie row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from codecllm.formats.tiling import Grid

BLOCK_ELEMENTS = 4096
"""Elements of a block: two vectors of 16 bytes of symbols per thread of four warps."""

WARPS = 4


@dataclass(frozen=True, slots=True)
class Blocks:
    """A grid's geometry as the kernels take it.

    Attributes:
        rows, cols, tile_rows, tile_cols: of the grid; if the tiles give the elements in order, of
            one tile that is the matrix.
        across: tiles side by side.
        tall, wide: blocks one above the other in a tile, and side by side.
        block_rows, block_cols: size of a block, powers of two.
        count: number of all blocks.
        one_tile: whether the matrix is seen as one tile, so that fewer divisions find a block.
    """

    rows: int
    cols: int
    tile_rows: int
    tile_cols: int
    across: int
    tall: int
    wide: int
    block_rows: int
    block_cols: int
    count: int
    one_tile: bool

    @property
    def geometry(self) -> tuple[int, ...]:
        """Run-time arguments of `find_block`."""
        return (
            self.rows,
            self.cols,
            self.tile_rows,
            self.tile_cols,
            self.across,
            self.tall,
            self.wide,
        )


def cut_blocks(grid: Grid, *, as_line: bool = False, across_tiles: bool = False) -> Blocks:
    """Cuts a grid's elements into blocks.

    Args:
        grid: the tiles.
        as_line: if the tiles give the elements in order, see them as one row.
        across_tiles: blocks may span tiles that stand side by side, but never two that stand one
            above the other.
    """
    rows, cols, tile_rows, tile_cols = grid.rows, grid.cols, grid.tile_rows, grid.tile_cols
    if across_tiles:
        tile_cols = max(cols, 1)
    elif grid.in_source_order:
        rows, cols = (1, rows * cols) if as_line else (rows, cols)
        tile_rows, tile_cols = max(rows, 1), max(cols, 1)
    block_cols = min(triton.next_power_of_2(min(tile_cols, max(cols, 1))), BLOCK_ELEMENTS)
    block_rows = min(
        BLOCK_ELEMENTS // block_cols, triton.next_power_of_2(min(tile_rows, max(rows, 1)))
    )
    tall, wide = -(-min(tile_rows, rows) // block_rows), -(-min(tile_cols, cols) // block_cols)
    down, across = -(-rows // tile_rows), -(-cols // tile_cols)
    count = down * across * tall * wide
    return Blocks(
        rows,
        cols,
        tile_rows,
        tile_cols,
        across,
        tall,
        wide,
        block_rows,
        block_cols,
        count,
        down * across == 1,
    )


def check_plane(plane: torch.Tensor, grid: Grid, out: torch.Tensor) -> None:
    """Raises ValueError where a plane or the output does not fit the grid (a caller's mistake)."""
    if (
        plane.dtype != torch.uint8
        or plane.numel() != grid.rows * grid.cols
        or not plane.is_contiguous()
    ):
        raise ValueError(
            f"a plane is not contiguous uint8 [{grid.rows * grid.cols}]: "
            f"{plane.dtype} {list(plane.shape)}"
        )
    if (
        out.numel() != grid.rows * grid.cols
        or not out.is_contiguous()
        or out.device != plane.device
    ):
        raise ValueError(f"output does not fit {grid}: {list(out.shape)} on {out.device}")


@triton.jit
def find_block(
    rows,
    cols,
    tile_rows,
    tile_cols,
    across,
    tall,
    wide,
    ONE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Returns where this program's block lies.

    Returns:
        place: int64, of the block's first symbol. width: int32, of its tile, the distance of its
        rows there. row, col: int64, of its first element in the matrix. height, breadth: int32, how
        many of its rows and columns exist; 0 or less where the block lies outside.
    """
    program = tl.program_id(0)
    left = (program % wide).to(tl.int64) * BLOCK_COLS
    program = program // wide
    if ONE_TILE:
        top = program.to(tl.int64) * BLOCK_ROWS
        height = tl.minimum(rows - top, BLOCK_ROWS).to(tl.int32)
        breadth = tl.minimum(cols - left, BLOCK_COLS).to(tl.int32)
        width = (left * 0 + cols).to(tl.int32)  # `cols` itself is a plain number where it is 1
        return top * cols + left, width, top, left, height, breadth
    top = (program % tall).to(tl.int64) * BLOCK_ROWS
    program = program // tall
    tile_col = (program % across).to(tl.int64) * tile_cols
    tile_row = (program // across).to(tl.int64) * tile_rows
    tile_height = tl.minimum(rows - tile_row, tile_rows)
    width = tl.minimum(cols - tile_col, tile_cols)
    place = tile_row * cols + tile_height * tile_col + top * width + left
    height = tl.minimum(tile_height - top, BLOCK_ROWS).to(tl.int32)
    breadth = tl.minimum(width - left, BLOCK_COLS).to(tl.int32)
    return place, width.to(tl.int32), tile_row + top, tile_col + left, height, breadth
