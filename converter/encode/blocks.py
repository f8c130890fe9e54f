"""Blocks: the pieces of a coded tensor that one worker reads and encodes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.formats.tiling import Grid

BLOCK_ELEMENTS = 1 << 20
"""About the elements of a block, over which `rans` tables are fitted."""

# Decoded bytes of a run: each is handed from thread to thread once, and few are in memory.
_RUN_BYTES = 4 << 20
ONE_PASS_COLUMNS = 1 << 22
"""Longest row whose scale is found while it is in memory; a longer one is read twice."""


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


def needs_scale_pass(plan: TensorPlan) -> bool:
    """Whether the scales of an int8 tensor must be known before its first block is quantized."""
    return (
        plan.scheme == "int8"
        and plan.params is None
        and (plan.kind == "column" or plan.grid.cols > ONE_PASS_COLUMNS)
    )


def blocks_of(plan: TensorPlan) -> Iterator[Block]:
    """Cuts a tensor into blocks of about 1 Mi elements: whole rows, or pieces of huge rows."""
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


def runs_of(plan: TensorPlan) -> Iterator[Block]:
    """Joins the blocks of a tensor to runs of whole rows: what a worker encodes at a time.

    A tensor under given steps keeps its blocks: whether its codes are wide is decided in each.
    """
    grid = plan.grid
    tile_rows, tile_cols = block_extent(grid)
    rows = tile_rows * grid.tile_rows
    itemsize = 1 if plan.scheme == "int8" else plan.source.dtype.itemsize
    block_bytes = itemsize * rows * grid.cols
    step = max(1, _RUN_BYTES // max(1, block_bytes))
    if plan.params is not None or tile_cols < grid.across:
        step = 1
    blocks = blocks_of(plan)
    while run := list(islice(blocks, step)):
        count = sum(block.rows for block in run)
        yield replace(run[0], last=run[-1].last, rows=count)


def block_extent(grid: Grid) -> tuple[int, int]:
    """Returns the tiles of a block: one above the other, and side by side."""
    # Only rows that are too long for one pass are cut: a block of whole rows is contiguous in the
    # source.
    if grid.across > 1 and grid.cols > ONE_PASS_COLUMNS:
        return 1, min(grid.across, max(1, BLOCK_ELEMENTS // grid.tile_cols))
    return max(1, BLOCK_ELEMENTS // max(grid.cols, 1) // grid.tile_rows), max(1, grid.across)


def group_tiles(grid: Grid) -> int:
    """Returns the tiles of a tensor without given steps that share a `rans` table."""
    down, across = block_extent(grid)
    return down * across


def group_extent(plan: TensorPlan) -> tuple[int, int]:
    """Returns the tiles that share a `rans` table: one above the other, and side by side."""
    # One table a block: it is fitted while the block is in memory, without a second pass. Under
    # given steps each column of tiles holds like columns, and gets a table of its own.
    down, across = block_extent(plan.grid)
    return down, across if plan.params is None else 1


def _pieces_of_rows(grid: Grid, step: int) -> Iterator[Block]:
    for row in range(grid.rows):
        for tile in range(0, grid.across, step):
            last = min(tile + step, grid.across)
            col = tile * grid.tile_cols
            cols = min(last * grid.tile_cols, grid.cols) - col
            yield Block(row * grid.across + tile, row * grid.across + last, row, col, 1, cols)


def tile_sizes(grid: Grid, block: Block) -> tuple[int, ...]:
    """Returns the elements of each tile of a block; tiles follow one another in them."""
    return _tile_sizes(grid.tile_rows, grid.tile_cols, block.rows, block.cols)


@lru_cache(maxsize=64)  # a model has many blocks of few shapes
def _tile_sizes(tile_rows: int, tile_cols: int, rows: int, cols: int) -> tuple[int, ...]:
    return tuple(
        min(tile_rows, rows - row) * min(tile_cols, cols - col)
        for row in range(0, rows, tile_rows)
        for col in range(0, cols, tile_cols)
    )
