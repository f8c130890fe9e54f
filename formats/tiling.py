"""Geometry: a tensor seen as a matrix of elements, and the grid of tiles that chunks cover."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from codecllm.formats.errors import LayoutError

# Record, padding and code table cost little beside it, and it fits the cache of a core.
DEFAULT_TILE_SYMBOLS = 1 << 17

ChannelKind = Literal["row", "column"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of the matrix: rows [row, row + rows), columns [col, col + cols)."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def symbols(self) -> int:
        """Number of elements in the tile."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of a matrix [rows, cols], row-major.

    Tile (i, j) begins at row i * tile_rows, column j * tile_cols. The last tile of a row or column
    of tiles may be smaller. A matrix without elements has no tiles.

    Examples:
        >>> grid = Grid(rows=5, cols=7, tile_rows=4, tile_cols=3)
        >>> grid.down, grid.across, len(grid)
        (2, 3, 6)
        >>> grid.tile(5)
        Tile(row=4, col=6, rows=1, cols=1)

    Raises:
        LayoutError: a tile has no extent.
    """

    rows: int
    cols: int
    tile_rows: int
    tile_cols: int

    def __post_init__(self) -> None:
        """Refuses tiles without extent."""
        if self.tile_rows < 1 or self.tile_cols < 1 or self.rows < 0 or self.cols < 0:
            raise LayoutError("tile or matrix has no extent", got=str(self))

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return -(-self.cols // self.tile_cols) if self.rows else 0

    @property
    def down(self) -> int:
        """Tiles one above the other."""
        return -(-self.rows // self.tile_rows) if self.cols else 0

    def __len__(self) -> int:
        return self.across * self.down

    def tile(self, index: int) -> Tile:
        """Returns tile `index` of the row-major order, 0 <= index < len(self)."""
        i, j = divmod(index, self.across)
        row = i * self.tile_rows
        col = j * self.tile_cols
        return Tile(
            row, col, min(self.tile_rows, self.rows - row), min(self.tile_cols, self.cols - col)
        )

    def __iter__(self) -> Iterator[Tile]:
        return (self.tile(index) for index in range(len(self)))

    @property
    def in_source_order(self) -> bool:
        """Whether the tiles one after another give the elements in row-major order."""
        return self.across <= 1 or self.tile_rows == 1


kept_grid = lru_cache(maxsize=256)(Grid)
"""Returns a grid, the same one for the same numbers: a model has many tensors of few shapes."""


@lru_cache(maxsize=256)  # a model has many tensors of few shapes
def default_grid(rows: int, cols: int, tile_symbols: int = DEFAULT_TILE_SYMBOLS) -> Grid:
    """Returns the grid that a writer takes by default.

    Whole rows up to `tile_symbols` elements and at least one row; a longer row is cut into equal
    column tiles (the last may be up to one element per tile shorter).

    Examples:
        >>> default_grid(1000, 4096)
        Grid(rows=1000, cols=4096, tile_rows=32, tile_cols=4096)
        >>> default_grid(2, 200_000)
        Grid(rows=2, cols=200000, tile_rows=1, tile_cols=100000)
    """
    cols_or_1 = max(cols, 1)
    if cols_or_1 <= tile_symbols:
        return Grid(rows, cols, max(1, min(rows, tile_symbols // cols_or_1)), cols_or_1)
    # Tiles of one size cost less than full ones and a small rest: each has its own code table.
    pieces = -(-cols // tile_symbols)
    return Grid(rows, cols, 1, -(-cols // pieces))


def last_axis_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the matrix of scheme `lossless`: rows of all leading dimensions, the last as columns.

    Examples:
        >>> last_axis_matrix((3, 20, 50))
        (60, 50)
    """
    return math.prod(shape[:-1]), shape[-1]


@lru_cache(maxsize=256)
def channel_matrix(shape: tuple[int, ...], axis: int, kind: ChannelKind) -> tuple[int, int]:
    """Returns the matrix [rows, cols] of scheme `int8`, in the source's memory order.

    Args:
        shape: the tensor's dimensions, two or more.
        axis: the output channel's dimension.
        kind: `row`: the leading dimensions up to and including `axis` x the rest, one scale per
            row. `column`: `axis` is the last dimension; the leading dimensions x `axis`, one scale
            per column.

    Raises:
        LayoutError: the axis does not exist, or a column axis is not the last.

    Examples:
        >>> channel_matrix((3, 20, 50), 1, "row"), channel_matrix((3, 20, 50), 2, "column")
        ((60, 50), (60, 50))
    """
    if (
        not 0 <= axis < len(shape)
        or len(shape) < 2
        or (kind == "column" and axis != len(shape) - 1)
    ):
        raise LayoutError(
            "channel axis does not fit the shape", got=f"axis {axis} ({kind}) of {list(shape)}"
        )
    split = axis + 1 if kind == "row" else axis
    return math.prod(shape[:split]), math.prod(shape[split:])
