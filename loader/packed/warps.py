"""Products of few inputs by single warps: `linear.cu`, on every device with matrix units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from codecllm.loader.kernels.nvrtc import Launch
from codecllm.loader.packed.kernels import (
    NULL,
    Launches,
    around_source,
    kernel_of,
    optional,
    prepare_launch,
    shared_memory,
    source_of,
)
from codecllm.loader.packed.layout import TILE_ROWS, tile_words
from codecllm.loader.packed.matrix import PackedMatrix

MAX_TOKENS = 64
"""Most inputs of `linear.cu`; the table in docs/gpu.md shows the crossing."""

MAX_SCALED_COLS = 1 << 14
"""Most columns whose scales every block of `linear.cu` applies itself."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Setting of `packed_linear`.

    Attributes:
        row_tiles: tiles of 16 rows that a warp multiplies.
        token_tiles: tiles of 8 inputs.
        row_warps: warps of a block with different rows.
        col_warps: warps of a block that share the columns of the same rows.
        splits: blocks that share the columns of the same rows; another kernel adds their sums.
        stages: buffers of a ring in shared memory; all but one are filled while one is read.
    """

    row_tiles: int
    token_tiles: int
    row_warps: int
    col_warps: int
    splits: int = 1
    stages: int = 4

    @property
    def rows(self) -> int:
        """Returns the rows of a block."""
        return TILE_ROWS * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        """Returns the threads of a block."""
        return 32 * self.row_warps * self.col_warps

    def shared(self, bits: int) -> int:
        """Returns the bytes of dynamic shared memory of a block, for `bits` a weight."""
        weights = self.row_warps * self.col_warps * self.row_tiles * 4 * tile_words(bits)
        inputs = 1024 * self.col_warps * self.token_tiles if self.token_tiles > 1 else 0
        return self.stages * (weights + inputs)

    def within(self, bits: int, shared: int) -> Shape:
        """Returns the shape with as many of its stages as fit.

        Two have to; where they do not, fewer warps share the columns.

        Args:
            bits: bits of a weight.
            shared: bytes of shared memory that a block may have.
        """
        static = 4 * 8 * self.rows * (self.col_warps + 1)
        stages = (shared - static) // (self.shared(bits) // self.stages)
        if stages < 2 and self.col_warps > 1:
            return replace(self, col_warps=self.col_warps // 2).within(bits, shared)
        return replace(self, stages=max(2, min(self.stages, stages)))

    def source(self, bits: int, is_half: bool) -> str:
        """Returns the source of `packed_linear` for `bits` a weight and the dtype of inputs."""
        return _source(self, bits, is_half)


@cache
def _source(shape: Shape, bits: int, is_half: bool) -> str:
    macros = {
        "BITS": bits,
        "IS_HALF": int(is_half),
        "ROW_TILES": shape.row_tiles,
        "TOKEN_TILES": shape.token_tiles,
        "ROW_WARPS": shape.row_warps,
        "COL_WARPS": shape.col_warps,
        "STAGES": shape.stages,
    }
    return source_of(macros, "tile.cu", "linear.cu")


@cache
def choose_shape(tokens: int, rows: int, cols: int, bits: int, shared: int) -> Shape:
    """Returns the shape that `packed_linear` uses: the fastest one of an H200.

    `benchmarks/device/packed.py` measures them.

    Few rows or many columns need more warps for the same rows, so that enough of them read memory
    at the same time.

    Args:
        tokens: number of inputs.
        rows: rows of the matrix.
        cols: its columns.
        bits: bits of a weight in the layout.
        shared: bytes of shared memory that a block may have.
    """
    return _fastest(tokens, rows, cols, bits).within(bits, shared)


def _fastest(tokens: int, rows: int, cols: int, bits: int) -> Shape:
    is_tall, is_short, is_wide = rows >= 8192, rows < 4096, cols >= 8192
    if tokens <= 8:
        if is_tall:
            return Shape(2, 1, 2, 4, stages=3) if bits <= 8 else Shape(1, 1, 1, 4, stages=3)
        if is_short:
            return Shape(1, 1, 1, 16, stages=3)
        return Shape(2, 1, 1, 16, stages=3) if bits <= 8 else Shape(1, 1, 1, 8, stages=3)
    if tokens <= 16:
        if is_tall:
            return Shape(2, 2, 8, 1, splits=4, stages=3)
        if is_short:
            return Shape(2, 2, 2, 4, splits=4, stages=3)
        return Shape(2, 2, 4, 4 if is_wide or bits < 8 else 2, splits=4)
    if tokens <= 32:
        if is_tall:
            return Shape(2, 4, 8, 1, splits=4)
        if is_short:
            return Shape(1, 4, 4, 2, splits=4)
        return Shape(2, 4, 4, 2, splits=4) if is_wide else Shape(1, 4, 8, 2, splits=4, stages=3)
    if is_tall:
        return Shape(2, 8, 8, 1, splits=4 if bits <= 8 else 2, stages=3)
    return Shape(1 if is_short else 2, 8, 4, 2, splits=4, stages=3)


@dataclass(frozen=True, slots=True)
class WarpPlan:
    """How a number of inputs is multiplied by `linear.cu`.

    Attributes:
        launch: of the product.
        prepare: launch that scales the inputs or writes them by column, or None.
        finish: launch that adds up the sums of blocks that share columns, or None.
        splits: such blocks.
        scales: whether `prepare` scales the inputs.
        by_column: elements of the inputs by column, 0 where they are not needed.
    """

    launch: Launch
    prepare: Launch | None
    finish: Launch | None
    splits: int
    scales: bool
    by_column: int

    def run(
        self, inputs: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, stream: int
    ) -> None:
        """Queues the product on a stream.

        Args:
            inputs: contiguous [..., cols], 16-byte aligned.
            bias: [rows] or None.
            out: [..., rows], written.
            stream: the handle of a stream of the current device.
        """
        rows = out.shape[-1]
        tokens = out.numel() // rows
        by_column = NULL
        if self.prepare is not None:
            scaled = torch.empty_like(inputs) if self.scales else inputs
            changes = [(0, inputs.data_ptr()), (2, scaled.data_ptr()), (4, tokens)]
            if self.by_column:
                by_column = inputs.new_empty(self.by_column)
                changes.append((3, by_column.data_ptr()))
            self.prepare.run(stream, changes)
            inputs = scaled
        changes = [(1, inputs.data_ptr()), (8, out.data_ptr()), (10, tokens)]
        if self.by_column:
            changes.append((2, by_column.data_ptr()))
        if bias is not None:
            changes.append((7, bias.data_ptr()))
        if self.finish is None:
            self.launch.run(stream, changes)
            return
        sums = inputs.new_empty(self.splits, tokens, rows, dtype=torch.float32)
        self.launch.run(stream, [*changes, (9, sums.data_ptr())])
        changes = [(0, sums.data_ptr()), (3, out.data_ptr()), (5, tokens)]
        if bias is not None:
            changes.append((2, bias.data_ptr()))
        self.finish.run(stream, changes)


def plan(
    matrix: PackedMatrix,
    launches: Launches,
    tokens: int,
    inputs: torch.Tensor,
    bias: torch.Tensor | None,
) -> WarpPlan:
    """Returns how `tokens` inputs like `inputs`, [..., cols], are multiplied."""
    rows, cols, bits, device = matrix.rows, matrix.cols, matrix.bits, inputs.device
    is_half = inputs.dtype == torch.float16
    # Every block scales one token in its shared memory: a kernel of its own takes longer.
    is_scaled_there = matrix.col_scale is not None and tokens == 1 and cols <= MAX_SCALED_COLS
    room = 2 * cols if is_scaled_there else 0
    shape = choose_shape(tokens, rows, cols, bits, shared_memory(device) - room)
    scales = matrix.col_scale is not None and not is_scaled_there
    needs_columns = matrix.first is not None and shape.token_tiles > 1
    key = (shape, is_half, bias is None, is_scaled_there)

    def product() -> Launch:
        col_scale = matrix.col_scale if is_scaled_there else None
        arguments: list[torch.Tensor | int] = [
            matrix.words,
            NULL,
            NULL,
            *optional(matrix.first, matrix.entries, matrix.scale, col_scale),
            NULL,
            NULL,
            NULL,
            tokens,
            rows,
            cols,
            matrix.factor,
        ]
        kernel = kernel_of("packed_linear", shape.source(bits, is_half), device)
        blocks = (-(-rows // shape.rows), shape.splits)
        return kernel.prepare(blocks, shape.threads, shape.shared(bits) + room, arguments)

    def prepare() -> Launch:
        tiles = shape.token_tiles
        blocks = min(-(-tiles * cols // 256), 512)
        sizes = (tokens, cols, tiles)
        return prepare_launch("prepare_inputs", matrix.col_scale, inputs, sizes, blocks)

    def finish() -> Launch:
        arguments: list[torch.Tensor | int] = [
            NULL,
            *optional(matrix.scale, None),
            NULL,
            shape.splits,
            tokens,
            rows,
        ]
        kernel = kernel_of("finish_splits", around_source(is_half), device)
        return kernel.prepare((min(-(-MAX_TOKENS * rows // 1024), 512), 1), 256, 0, arguments)

    prepares, finishes = scales or needs_columns, shape.splits > 1
    return WarpPlan(
        launches.get(("linear", *key), product),
        launches.get(("prepare", *key), prepare) if prepares else None,
        launches.get(("finish", *key), finish) if finishes else None,
        shape.splits,
        scales,
        8 * shape.token_tiles * cols if needs_columns else 0,
    )
