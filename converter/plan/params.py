"""Quantization parameters of an `int8` tensor, supplied by the caller.

Scales, groups, tiles, codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.records import DEADZONE, NEAREST
from codecllm.formats.schemes.columns import order_of
from codecllm.formats.schemes.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.schemes.int8 import MAX_WIDE_CODE, MIN_WIDE_CODE
from codecllm.formats.tiling import DEFAULT_TILE_SYMBOLS, Grid, default_grid

COLUMN_GROUPS = 8
"""Groups of like columns by default, where each can have enough symbols."""

MIN_TILE_SYMBOLS = 1 << 16
"""Symbols of a tile by default, where the tensor has so many: the code table of a smaller one costs
too much.
"""

_MIN_COLUMNS = 32

WIDE_CODES, NARROW_CODES = (MIN_WIDE_CODE, MAX_WIDE_CODE), (-127, 127)
"""The smallest and the largest code of two planes, and of one."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantParams:
    """How an `int8` tensor is quantized.

    Code of (r, c) = rint(fl32(w / step)), step = fl32(row_scale[r] * col_scale[c]).

    With a `deadzone` d the quotient x is moved d toward zero first: rint(fl32(x - copysign(d, x))).
    Rows and columns are those of the plan's `matrix`. For a plan of kind `column` (Conv1D),
    `row_scale` has one entry per output channel, as always, and `col_scale` and `col_groups` must
    be None.

    Attributes:
        row_scale: float32 [channels].
        col_scale: float32 [cols] in the source's order, or None for 1 everywhere.
        col_groups: uint8 [cols]: which columns are alike. Columns are stored group by group, within
            one as in the source; only beside `col_scale`, or None.
        tile: rows and columns of a tile of the stored matrix; None takes `column_tiles` or, without
            `col_scale`, whole rows.
        deadzone: how far quotients are moved toward zero before they are rounded, a float32 value
            in [0, 0.5); 0 rounds to nearest.
        codes: gives int16 [last - first, cols] for rows [first, last), columns in the source's
            order; called from several threads, once or twice for each block of rows. None rounds as
            `deadzone` says.
        refined: the name of the method behind `codes`; None where there are none.
        wide: whether codes beyond 127 are to be expected. It only spares a second look at tensors
            of several blocks.
        limits: the smallest and the largest code that a method behind `codes` may choose.
    """

    row_scale: NDArray[np.float32]
    col_scale: NDArray[np.float32] | None = None
    col_groups: NDArray[np.uint8] | None = None
    tile: tuple[int, int] | None = None
    deadzone: float = 0.0
    codes: Callable[[int, int], NDArray[np.int16]] | None = None
    refined: str | None = None
    wide: bool = False
    limits: tuple[int, int] = WIDE_CODES

    @property
    def rounding(self) -> str:
        """The rounding by its name in the manifest.

        `nearest`, `deadzone`, or the method behind `codes`.
        """
        return self.refined or (DEADZONE if self.deadzone else NEAREST)

    @property
    def order(self) -> NDArray[np.int32] | None:
        """int32 [cols]: the columns of the source as they are stored.

        None where they stand as in the source.
        """
        return None if self.col_groups is None else order_of(self.col_groups)

    @property
    def scale_dtype(self) -> str:
        """`BF16` where all scales have values of that type, and are thus stored as such.

        Otherwise `F32`.
        """
        scales = [self.row_scale] if self.col_scale is None else [self.row_scale, self.col_scale]
        return (
            "BF16"
            if all(np.array_equal(nearest_bf16(values), values) for values in scales)
            else "F32"
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of scales and groups in a shard."""
        scales = self.row_scale.size + (0 if self.col_scale is None else self.col_scale.size)
        return scales * DTYPES[self.scale_dtype].itemsize + (
            0 if self.col_groups is None else self.col_groups.size
        )

    @property
    def largest(self) -> np.float32:
        """The largest step."""
        largest: np.float32 = self.row_scale.max()
        return largest if self.col_scale is None else largest * self.col_scale.max()


def nearest_bf16(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 scales rounded to the nearest values of type BF16, ties to even."""
    return float32_from_bits(bits_from_float32(scales, "BF16"), "BF16")


def next_bf16(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns for each positive float32 scale the smallest BF16 value that is not below it."""
    # Positive floats are ordered like their bits: adding all bits that are cut off rounds up.
    return ((scales.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def column_tiles(
    rows: int, cols: int, groups: int = COLUMN_GROUPS, tile_symbols: int = DEFAULT_TILE_SYMBOLS
) -> tuple[int, int]:
    """Returns rows and columns of the tiles for a matrix whose like columns stand together.

    Up to `groups` tiles side by side, at least 32 columns wide and of at least 65,536 symbols where
    the matrix is large enough, and as many rows as `tile_symbols` symbols (131,072) allow.

    Examples:
        >>> column_tiles(4096, 4096)
        (256, 512)
        >>> column_tiles(100, 80)
        (100, 80)
    """
    fitting = max(1, min(groups, rows * cols // MIN_TILE_SYMBOLS, cols // _MIN_COLUMNS))
    width = -(-cols // fitting)
    return max(1, min(rows, tile_symbols // width)), width


def like_columns(squares: NDArray[np.float64], width: int) -> NDArray[np.uint8]:
    """Returns groups of `width` columns, uint8 [cols], in ascending order of `squares` [cols].

    Examples:
        >>> like_columns(np.array([9.0, 1.0, 4.0, 2.0]), 2).tolist()
        [1, 0, 1, 0]
    """
    groups = np.empty(squares.size, np.uint8)
    groups[np.argsort(squares, kind="stable")] = np.arange(squares.size) // width
    return groups


def grid_of(
    params: QuantParams, rows: int, cols: int, tile_symbols: int = DEFAULT_TILE_SYMBOLS
) -> Grid:
    """Returns the tiles of a tensor with these steps."""
    if params.tile is not None:
        return Grid(rows, cols, *params.tile)
    if params.col_scale is None:
        return default_grid(rows, cols, tile_symbols)
    return Grid(rows, cols, *column_tiles(rows, cols, tile_symbols=tile_symbols))


def max_tiles(rows: int, cols: int) -> int:
    """Returns the most tiles that parameters may ask for.

    That is one per 4096 symbols, and some for small or narrow matrices.
    """
    return 64 + rows * cols // 4096 + 2 * (rows + cols) // 64
