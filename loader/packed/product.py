"""Products with packed matrices: which kernel multiplies how many inputs, and its launch.

Up to `MAX_TOKENS` inputs `linear.cu` multiplies: it reads each packed word once and sums in
float32. For codes it applies the row's scale to the sum, so a result differs from that of dense
weights by the rounding of these weights, at most 2^-9 of each product for bfloat16 (2^-12 for
float16), beside the order of summation. Products with bfloat16 weights use exactly these weights.
More inputs, other dtypes and other devices: the weights are unpacked into scratch and multiplied by
cuBLAS, with the bits of a dense layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.nn import functional

from codecllm.loader.kernels.nvrtc import Launch
from codecllm.loader.kernels.on_device import current_stream, on_device_of
from codecllm.loader.packed.kernels import (
    UNPACK_SHAPE,
    Shape,
    has_kernels,
    kernel_of,
    shared_memory,
)
from codecllm.loader.packed.layout import TILE_ROWS
from codecllm.loader.packed.matrix import PackedMatrix, dequantize, gather
from codecllm.loader.resident.int8_matmul import product_by_blocks

MAX_TOKENS = 64
"""Most inputs of `linear.cu`; the table in docs/gpu.md shows the crossing."""

MAX_SCALED_COLS = 1 << 14
"""Most columns whose scales every block of `linear.cu` applies itself."""

_BF16_ONE = 127
"""Exponent of 1 in bfloat16."""


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


def fuses(matrix: PackedMatrix, inputs: torch.Tensor) -> bool:
    """Whether `linear.cu` multiplies these inputs."""
    tokens = inputs.numel() // matrix.cols
    dtypes = (torch.bfloat16,) if matrix.is_bf16 else (torch.bfloat16, torch.float16)
    return (
        0 < tokens <= MAX_TOKENS
        and inputs.dtype in dtypes
        and inputs.device.type == "cuda"
        and has_kernels(inputs.device)
    )


class PackedProduct:
    """The products of one matrix; keeps prepared launches for the shapes that were used."""

    def __init__(self, matrix: PackedMatrix) -> None:
        """Keeps the matrix."""
        self.matrix = matrix
        self._plans: dict[tuple[int, torch.dtype, bool], _Plan] = {}
        self._launches: dict[tuple[str, Shape, bool, bool, bool], Launch] = {}

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns `inputs @ weight.T + bias`.

        Args:
            inputs: float [..., cols] on the matrix's device.
            bias: [rows] of the same dtype, or None.

        Returns:
            [..., rows], dtype of `inputs`.
        """
        if fuses(self.matrix, inputs):
            return self._fused(inputs, bias)
        return self._by_scratch(inputs, bias)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weights, `dtype` [rows, cols], with the bits of dense loading."""
        if not self._has_unpack(dtype):
            return dequantize(self.matrix, dtype)
        return self._unpacked(dtype, 0, self.matrix.rows)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns rows of the weights, `dtype` [n, cols], with the bits of dense loading.

        Args:
            rows: integers [n] on the matrix's device.
            dtype: dtype of the result.
        """
        matrix = self.matrix
        if not self._has_unpack(dtype) or not len(rows):
            return gather(matrix, rows, dtype)
        out = torch.empty(len(rows), matrix.cols, dtype=dtype, device=rows.device)
        is_half = dtype == torch.float16
        kernel = kernel_of("packed_gather", matrix.bits, is_half, _GATHER, rows.device)
        arguments: list[torch.Tensor | int] = [
            matrix.words,
            rows.to(torch.int64).contiguous(),
            *_optional(matrix.first, matrix.entries, matrix.scale, matrix.col_scale),
            out,
            matrix.rows,
            matrix.cols,
            _factor(matrix),
        ]
        kernel.launch(len(rows), _GATHER.threads, 0, arguments)
        return out

    def _has_unpack(self, dtype: torch.dtype) -> bool:
        matrix = self.matrix
        fits = dtype == torch.bfloat16 or (dtype == torch.float16 and not matrix.is_bf16)
        return fits and matrix.words.device.type == "cuda" and has_kernels(matrix.words.device)

    def _unpacked(self, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Returns rows of the weights from `start`, a multiple of 16, to `stop`."""
        matrix = self.matrix
        out = torch.empty(stop - start, matrix.cols, dtype=dtype, device=matrix.words.device)
        is_half = dtype == torch.float16
        kernel = kernel_of("packed_unpack", matrix.bits, is_half, UNPACK_SHAPE, matrix.words.device)
        first = None if matrix.first is None else matrix.first[start:]
        scale = None if matrix.scale is None else matrix.scale[start:]
        arguments: list[torch.Tensor | int] = [
            matrix.words[start // TILE_ROWS :],
            *_optional(first, matrix.entries, scale, matrix.col_scale),
            out,
            stop - start,
            matrix.cols,
            _factor(matrix),
        ]
        blocks = -(-(stop - start) // TILE_ROWS)
        kernel.launch(blocks, UNPACK_SHAPE.threads, 0, arguments)
        return out

    def _by_scratch(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiplies unpacked weights, in blocks of rows where the matrix is large."""
        matrix, dtype = self.matrix, inputs.dtype
        if not self._has_unpack(dtype):
            return functional.linear(inputs, self.dense(dtype), bias)
        return product_by_blocks(
            inputs,
            bias,
            torch.Size((matrix.rows, matrix.cols)),
            lambda block: self._unpacked(dtype, block.start, block.stop),
        )

    def _fused(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, cols = self.matrix.rows, self.matrix.cols
        tokens = inputs.numel() // cols
        flat = inputs
        if not inputs.is_contiguous() or inputs.data_ptr() % 16:
            flat = inputs.clone(memory_format=torch.contiguous_format)
        out = inputs.new_empty(*inputs.shape[:-1], rows)
        key = (tokens, inputs.dtype, bias is None)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(tokens, flat, bias, out)
        splits = plan.shape.splits
        with on_device_of(flat):
            stream = current_stream(flat.device)
            by_column = sums = _NULL
            if plan.prepares:
                flat, by_column = self._prepared(flat, tokens, plan, stream)
            changes = [
                (1, flat.data_ptr()),
                (8, out.data_ptr()),
                (10, tokens),
            ]
            if plan.prepares:
                changes.append((2, by_column.data_ptr()))
            if bias is not None:
                changes.append((7, bias.data_ptr()))
            if splits > 1:
                sums = inputs.new_empty(splits, tokens, rows, dtype=torch.float32)
                changes.append((9, sums.data_ptr()))
            plan.launch.run(stream, changes)
            if splits > 1:
                self._finish(sums, bias, out, stream)
        return out

    def _plan(
        self, tokens: int, inputs: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> _Plan:
        matrix, shared = self.matrix, shared_memory(inputs.device)
        # Every block scales one token in its shared memory: a kernel of its own takes longer.
        scales = matrix.col_scale is not None and tokens == 1 and matrix.cols <= MAX_SCALED_COLS
        room = 2 * matrix.cols if scales else 0
        shape = choose_shape(tokens, matrix.rows, matrix.cols, matrix.bits, shared - room)
        has_columns = matrix.first is not None and shape.token_tiles > 1
        prepares = has_columns or (matrix.col_scale is not None and not scales)
        is_half = inputs.dtype == torch.float16
        key = ("linear", shape, is_half, bias is not None, scales)
        launch = self._launches.get(key)
        if launch is None:
            kernel = kernel_of("packed_linear", matrix.bits, is_half, shape, inputs.device)
            blocks = (-(-matrix.rows // shape.rows), shape.splits)
            col_scale = matrix.col_scale if scales else None
            arguments: list[torch.Tensor | int] = [
                matrix.words,
                inputs,
                inputs,
                *_optional(matrix.first, matrix.entries, matrix.scale, col_scale, bias),
                out,
                _NULL,
                tokens,
                matrix.rows,
                matrix.cols,
                _factor(matrix),
            ]
            launch = kernel.prepare(
                blocks, shape.threads, shape.shared(matrix.bits) + room, arguments
            )
            self._launches[key] = launch
        return _Plan(shape, launch, prepares, has_columns)

    def _prepared(
        self, flat: torch.Tensor, tokens: int, plan: _Plan, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs [tokens, cols] times the scales of columns, and the same by column."""
        matrix, token_tiles = self.matrix, plan.shape.token_tiles
        scaled = flat if matrix.col_scale is None else torch.empty_like(flat)
        by_column = _NULL
        if plan.has_columns:
            by_column = flat.new_empty(matrix.cols, 8 * token_tiles)
        shape = replace(_SMALL, token_tiles=token_tiles)
        key = ("prepare", shape, flat.dtype == torch.float16, False, False)
        launch = self._launches.get(key)
        if launch is None:
            kernel = kernel_of("prepare_inputs", 8, key[2], _SMALL, flat.device)
            arguments: list[torch.Tensor | int] = [
                flat,
                *_optional(matrix.col_scale),
                scaled,
                by_column,
                tokens,
                matrix.cols,
                token_tiles,
            ]
            blocks = min(-(-token_tiles * matrix.cols // 256), 512)
            launch = kernel.prepare((blocks, 1), 256, 0, arguments)
            self._launches[key] = launch
        changes = [
            (0, flat.data_ptr()),
            (2, scaled.data_ptr()),
            (4, tokens),
        ]
        if plan.has_columns:
            changes.append((3, by_column.data_ptr()))
        launch.run(stream, changes)
        return scaled, by_column

    def _finish(
        self, sums: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, stream: int
    ) -> None:
        """Adds up the sums of blocks that share columns."""
        matrix = self.matrix
        splits, tokens, rows = sums.shape
        is_half = out.dtype == torch.float16
        key = ("finish", replace(_SMALL, splits=splits), is_half, bias is not None, False)
        launch = self._launches.get(key)
        if launch is None:
            kernel = kernel_of("finish_splits", 8, is_half, _SMALL, out.device)
            scales = _optional(matrix.scale, bias)
            arguments: list[torch.Tensor | int] = [
                sums,
                *scales,
                out,
                splits,
                tokens,
                rows,
            ]
            blocks = min(-(-MAX_TOKENS * rows // 1024), 512)
            launch = kernel.prepare((blocks, 1), 256, 0, arguments)
            self._launches[key] = launch
        changes = [
            (0, sums.data_ptr()),
            (3, out.data_ptr()),
            (5, tokens),
        ]
        if bias is not None:
            changes.append((2, bias.data_ptr()))
        launch.run(stream, changes)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a number of inputs is multiplied.

    Attributes:
        shape: setting of the kernel.
        launch: of the kernel.
        prepares: whether another kernel prepares the inputs.
        has_columns: whether the inputs are needed by column too.
    """

    shape: Shape
    launch: Launch
    prepares: bool
    has_columns: bool


_GATHER = Shape(1, 1, 1, 4)
_SMALL = Shape(1, 1, 1, 8)
"""For kernels that do not depend on a shape."""


def _optional(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [_NULL if tensor is None else tensor for tensor in tensors]


_NULL = torch.empty(0)
"""Stands for a null pointer: a tensor without elements has the address 0."""


def _factor(matrix: PackedMatrix) -> int:
    """Returns 2^base as two bfloat16 in one word."""
    exponent = (matrix.base + _BF16_ONE) << 7 if matrix.is_bf16 else 0
    return exponent << 16 | exponent
