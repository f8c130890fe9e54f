"""The plan of one tensor: scheme, output channel, tiles and quantization parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.plan.params import QuantParams, grid_of, max_tiles
from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.codecs import CodecName, rans
from codecllm.formats.codecs.rans_groups import max_tables_bytes
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import FormatError, LayoutError, UsageError
from codecllm.formats.manifest.records import DEADZONE, NEAREST
from codecllm.formats.schemes.int8 import check_steps
from codecllm.formats.shards.side_tensors import SIDE_TENSORS, CodedLayout, SideTensor
from codecllm.formats.tiling import (
    DEFAULT_TILE_SYMBOLS,
    ChannelKind,
    Grid,
    channel_matrix,
    default_grid,
    last_axis_matrix,
)

_TABLE_HEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """The plan of one tensor.

    Attributes:
        source: the tensor.
        scheme: `raw`, `lossless` or `int8`.
        axis: output channel's dimension (int8).
        kind: whether each row or each column of the matrix view has a scale (int8).
        fallback: why the scheme is not the one asked for, or None.
        codec: how its chunks are packed where that shrinks them.
        accepts_params: whether it may get chosen parameters (int8): room is kept for their side
            tensors.
        params: the chosen ones, or None.
        wide: whether its codes have 16 bits (int8).
        tile_symbols: most elements of a tile of whole rows.
    """

    source: SourceTensor
    scheme: Literal["raw", "lossless", "int8"]
    axis: int = 0
    kind: ChannelKind = "row"
    fallback: str | None = None
    codec: CodecName = "zstd"
    accepts_params: bool = False
    params: QuantParams | None = None
    wide: bool = False
    tile_symbols: int = DEFAULT_TILE_SYMBOLS

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix as which a coded tensor is seen."""
        if self.scheme == "int8":
            return channel_matrix(self.source.shape, self.axis, self.kind)
        return last_axis_matrix(self.source.shape)

    @property
    def grid(self) -> Grid:
        """The tiles of a coded tensor."""
        if self.params is None:
            return default_grid(*self.matrix, self.tile_symbols)
        return grid_of(self.params, *self.matrix, self.tile_symbols)

    @property
    def planes(self) -> int:
        """Planes of a coded tensor."""
        return (2 if self.wide else 1) if self.scheme == "int8" else self.source.dtype.planes

    @property
    def channels(self) -> int:
        """Number of scales (int8)."""
        rows, cols = self.matrix
        return rows if self.kind == "row" else cols

    @property
    def layout(self) -> CodedLayout:
        """The facts on which the side tensors of a coded tensor depend, under its steps."""
        return _layout(
            self.source.shape,
            self.axis if self.scheme == "int8" else None,
            self.kind,
            "F32" if self.params is None else self.params.scale_dtype,
            self.codec == rans.NAME,
        )

    @property
    def longest_layout(self) -> CodedLayout:
        """As `layout`, with the longest name that the type of the scales may get."""
        return replace(self.layout, scale_dtype="BF16") if self.accepts_params else self.layout

    @property
    def possible_sides(self) -> list[SideTensor]:
        """The side tensors that a coded tensor may come to have.

        Only chosen steps bring the optional ones.
        """
        return _possible_sides(self.layout, self.accepts_params)

    @property
    def max_stored_bytes(self) -> int:
        """Upper bound of the tensor's bytes in a shard, side data included, fallbacks not."""
        if self.scheme == "raw":
            return self.source.entry.bytes
        planes, tiles = self.planes, len(self.grid)
        # Chosen steps may bring codes of two planes and the smallest tiles; neither is known yet.
        if self.accepts_params:
            planes, tiles = 2, max(tiles, max_tiles(*self.matrix))
        chunks = tiles * planes
        side = _TABLE_HEAD_BYTES + 16 * chunks + _max_side_bytes(self.layout, self.accepts_params)
        if self.codec == rans.NAME:
            side += max_tables_bytes(chunks)
        return self.source.entry.elements * planes + 16 * chunks + side


# A model has many tensors of few layouts, and each plan is asked several times.
@lru_cache(maxsize=256)
def _layout(
    shape: tuple[int, ...], axis: int | None, kind: ChannelKind, scale_dtype: str, uses_rans: bool
) -> CodedLayout:
    """Returns `TensorPlan.layout`; `axis` is None where the scheme is not `int8`."""
    is_int8 = axis is not None
    rows, cols = last_axis_matrix(shape) if axis is None else channel_matrix(shape, axis, kind)
    return CodedLayout(
        int8=is_int8,
        rank=len(shape),
        columns=cols,
        channels=(rows if kind == "row" else cols) if is_int8 else 0,
        kind=kind,
        scale_dtype=scale_dtype,
        rans=uses_rans,
    )


@lru_cache(maxsize=256)
def _possible_sides(layout: CodedLayout, accepts_params: bool) -> list[SideTensor]:
    presences = ("always", "optional") if accepts_params else ("always",)
    return [side for side in SIDE_TENSORS if side.presence(layout) in presences]


@lru_cache(maxsize=256)
def _max_side_bytes(layout: CodedLayout, accepts_params: bool) -> int:
    """Returns an upper bound of the side tensors whose lengths are known before encoding."""
    # Counted as for rows, and at 4 bytes an element or more: where shards are cut follows from
    # this bound, so another bound would be another output.
    if accepts_params:
        layout = replace(layout, kind="row")
    total = 0
    for side in _possible_sides(layout, accepts_params):
        length = side.length(layout)
        if length is not None:
            total += length * max(4, DTYPES[side.dtype(layout)].itemsize)
    return total


ParamsProvider = Callable[[TensorPlan], QuantParams | None]
"""Chooses the quantization parameters of an `int8` tensor; None takes the scales from each
channel's largest weight.
"""


def check_params(params: QuantParams, plan: TensorPlan) -> None:
    """Checks steps before anything is written.

    Raises:
        UsageError: they do not fit the tensor, or the format forbids them.
    """
    rows, cols = plan.matrix
    where: dict[str, Any] = {"file": plan.source.file.name, "tensor": plan.source.name}
    _check_array("row_scale", params.row_scale, plan.channels, where)
    if plan.kind == "column" and not (params.col_scale is None and params.col_groups is None):
        raise UsageError(
            "a tensor with a scale for each column has no second one and no groups of columns",
            **where,
        )
    if params.col_groups is not None and params.col_scale is None:
        raise UsageError("groups of columns need scales of columns", **where)
    if params.col_scale is not None:
        _check_array("col_scale", params.col_scale, cols, where)
    if params.col_groups is not None:
        _check_array("col_groups", params.col_groups, cols, where, np.uint8)
    try:
        check_steps(params.row_scale, params.col_scale, wide=False)
        grid = grid_of(params, rows, cols)
        if len(grid) > max_tiles(rows, cols):
            raise LayoutError(
                "too many tiles", got=len(grid), expected=f"at most {max_tiles(rows, cols)}"
            )
    except FormatError as exc:
        raise UsageError(f"steps: {exc}", **where) from exc
    if (params.codes is None) != (params.refined is None) or params.refined in (NEAREST, DEADZONE):
        raise UsageError(
            "codes and the name of their rounding come together", got=params.refined, **where
        )
    if not 0 <= params.deadzone < 0.5 or float(np.float32(params.deadzone)) != params.deadzone:
        raise UsageError(
            "deadzone", got=params.deadzone, expected="a float32 value from 0 to below 0.5", **where
        )


def _check_array(
    name: str, values: NDArray[Any], size: int, where: dict[str, Any], dtype: type = np.float32
) -> None:
    if values.dtype != dtype or values.shape != (size,):
        got, expected = f"{values.dtype} {list(values.shape)}", f"{np.dtype(dtype)} [{size}]"
        raise UsageError(f"{name} has a wrong type or shape", got=got, expected=expected, **where)
