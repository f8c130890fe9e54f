"""Products with packed matrices: which kernel multiplies how many inputs, and its launch.

Up to `MAX_TOKENS` inputs `linear.cu` multiplies: it reads each packed word once and sums in
float32. For codes it applies the row's scale to the sum, so a result differs from that of dense
weights by the rounding of these weights, at most 2^-9 of each product for bfloat16 (2^-12 for
float16), beside the order of summation. Products with bfloat16 weights use exactly these weights.
More inputs, other dtypes and other devices: the weights are unpacked into scratch and multiplied by
cuBLAS, with the bits of a dense layer.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.loader.kernels.nvrtc import Kernel, Launch
from codecllm.loader.kernels.on_device import on_device_of
from codecllm.loader.packed.layout import BF16_BITS, TILE_COLS, TILE_ROWS
from codecllm.loader.packed.matrix import PackedMatrix, dequantize, gather

MAX_TOKENS = 64
"""Most inputs of `linear.cu`; the table in docs/gpu.md shows the crossing."""

SCRATCH_ELEMENTS = 1 << 26
"""Most weights unpacked at once (128 MiB of 16 bits); a larger matrix is cut into row blocks."""

_SOURCE = Path(__file__).with_name("linear.cu")
_UNPACK_WARPS = 8
_BF16_ONE = 127
"""Exponent of 1 in bfloat16."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Setting of `packed_linear`.

    Attributes:
        row_tiles: tiles of 16 rows that a warp multiplies.
        token_tiles: tiles of 8 inputs.
        row_warps: warps of a block with different rows.
        col_warps: warps of a block that share the columns of the same rows.
        splits: blocks that share the columns of the same rows; another kernel adds their sums.
    """

    row_tiles: int
    token_tiles: int
    row_warps: int
    col_warps: int
    splits: int = 1

    @property
    def rows(self) -> int:
        """Returns the rows of a block."""
        return TILE_ROWS * self.row_tiles * self.row_warps

    @property
    def threads(self) -> int:
        """Returns the threads of a block."""
        return 32 * self.row_warps * self.col_warps


def choose_shape(tokens: int, rows: int, cols: int, bits: int) -> Shape:
    """Returns the shape that `packed_linear` uses: the fastest one of an H200.

    `benchmarks/device/packed.py` measures them.

    Few rows or many columns need more warps for the same rows, so that enough of them read memory
    at the same time.
    """
    is_tall, is_wide = rows >= 8192, cols >= 8192
    if tokens <= 8:
        if not is_tall or is_wide:
            return Shape(1, 1, 1, 16)
        return Shape(1, 1, 1, 4 if bits == BF16_BITS else 8)
    if tokens <= 16:
        return Shape(2, 2, 2, 4) if is_tall else Shape(1, 2, 1, 16)
    if tokens <= 32:
        if is_tall:
            return Shape(2, 4, 4, 4) if bits > 5 else Shape(2, 4, 2, 4)
        return Shape(2, 4, 4, 4, splits=4) if is_wide else Shape(1, 4, 1, 8)
    if is_tall:
        return Shape(2, 8, 4, 2)
    return Shape(2, 8, 2, 4, splits=2) if is_wide else Shape(1, 8, 1, 8)


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
        self._launches: dict[tuple[str, Shape, bool, bool], Launch] = {}

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
        shape = Shape(1, 1, 1, _UNPACK_WARPS)
        is_half = dtype == torch.float16
        kernel = kernel_of("packed_unpack", matrix.bits, is_half, shape, matrix.words.device)
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
        kernel.launch(blocks, 32 * _UNPACK_WARPS, 0, arguments)
        return out

    def _by_scratch(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiplies unpacked weights, in blocks of rows where the matrix is large."""
        matrix = self.matrix
        step = max(TILE_ROWS, SCRATCH_ELEMENTS // matrix.cols // TILE_ROWS * TILE_ROWS)
        if matrix.rows <= step or not self._has_unpack(inputs.dtype):
            return functional.linear(inputs, self.dense(inputs.dtype), bias)
        parts = []
        for start in range(0, matrix.rows, step):
            stop = min(start + step, matrix.rows)
            weight = self._unpacked(inputs.dtype, start, stop)
            block_bias = None if bias is None else bias[start:stop]
            parts.append(functional.linear(inputs, weight, block_bias))
        return torch.cat(parts, dim=-1)

    def _fused(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrix = self.matrix
        flat = inputs.reshape(-1, matrix.cols)
        if not flat.is_contiguous() or flat.data_ptr() % 16:
            flat = flat.clone(memory_format=torch.contiguous_format)
        tokens = flat.shape[0]
        out = flat.new_empty(tokens, matrix.rows)
        shape = choose_shape(tokens, matrix.rows, matrix.cols, matrix.bits)
        sums = _NULL
        if shape.splits > 1:
            sums = out.new_empty(shape.splits, tokens, matrix.rows, dtype=torch.float32)
        with on_device_of(flat):
            stream = _stream(flat.device)
            prepared, by_column = self._prepared(flat, shape.token_tiles, stream)
            launch = self._launch(shape, flat, bias, out, sums)
            changes = [(1, prepared.data_ptr()), (2, by_column.data_ptr())]
            changes += [(7, out.data_ptr()), (9, tokens)]
            if bias is not None:
                changes.append((6, bias.data_ptr()))
            if shape.splits > 1:
                changes.append((8, sums.data_ptr()))
            launch.run(stream, changes)
            if shape.splits > 1:
                self._finish(sums, bias, out, stream)
        return out.view(*inputs.shape[:-1], matrix.rows)

    def _launch(
        self,
        shape: Shape,
        inputs: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        sums: torch.Tensor,
    ) -> Launch:
        is_half = inputs.dtype == torch.float16
        key = ("linear", shape, is_half, bias is not None)
        launch = self._launches.get(key)
        if launch is None:
            matrix = self.matrix
            kernel = kernel_of("packed_linear", matrix.bits, is_half, shape, inputs.device)
            blocks = (-(-matrix.rows // shape.rows), shape.splits)
            optional = _optional(matrix.first, matrix.entries, matrix.scale, bias)
            sizes = [inputs.shape[0], matrix.rows, matrix.cols, _factor(matrix)]
            arguments: list[torch.Tensor | int] = [
                matrix.words,
                inputs,
                inputs,
                *optional,
                out,
                sums,
                *sizes,
            ]
            launch = kernel.prepare(blocks, shape.threads, 0, arguments)
            self._launches[key] = launch
        return launch

    def _prepared(
        self, flat: torch.Tensor, token_tiles: int, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the inputs, scaled and laid out for `packed_linear`, and the same by column."""
        matrix = self.matrix
        tokens = flat.shape[0]
        needs_columns = matrix.first is not None and max(tokens, token_tiles) > 1
        if matrix.col_scale is None and not needs_columns and token_tiles == 1:
            return flat, flat
        padded = -(-matrix.cols // TILE_COLS) * TILE_COLS
        if token_tiles == 1:
            prepared = torch.empty_like(flat)
        else:
            prepared = flat.new_empty(8 * token_tiles, padded)
        by_column = flat.new_empty(matrix.cols, 8 * token_tiles) if needs_columns else prepared
        key = (
            "prepare",
            replace(_PREPARE, token_tiles=token_tiles),
            flat.dtype == torch.float16,
            needs_columns,
        )
        launch = self._launches.get(key)
        if launch is None:
            kernel = kernel_of("prepare_inputs", 8, key[2], _PREPARE, flat.device)
            col_scale, columns = _optional(matrix.col_scale, by_column if needs_columns else None)
            arguments: list[torch.Tensor | int] = [
                flat,
                col_scale,
                prepared,
                columns,
                tokens,
                matrix.cols,
                token_tiles,
            ]
            blocks = min(-(-8 * token_tiles * padded // 1024), 512)
            launch = kernel.prepare((blocks, 1), 256, 0, arguments)
            self._launches[key] = launch
        changes = [(0, flat.data_ptr()), (2, prepared.data_ptr()), (4, tokens)]
        if needs_columns:
            changes.append((3, by_column.data_ptr()))
        launch.run(stream, changes)
        return prepared, by_column

    def _finish(
        self, sums: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, stream: int
    ) -> None:
        """Adds up the sums of blocks that share columns."""
        matrix = self.matrix
        key = (
            "finish",
            replace(_PREPARE, splits=len(sums)),
            out.dtype == torch.float16,
            bias is not None,
        )
        launch = self._launches.get(key)
        if launch is None:
            kernel = kernel_of("finish_splits", 8, key[2], _PREPARE, out.device)
            optional = _optional(matrix.scale, bias)
            arguments: list[torch.Tensor | int] = [
                sums,
                *optional,
                out,
                len(sums),
                len(out),
                matrix.rows,
            ]
            blocks = min(-(-MAX_TOKENS * matrix.rows // 1024), 512)
            launch = kernel.prepare((blocks, 1), 256, 0, arguments)
            self._launches[key] = launch
        changes = [(0, sums.data_ptr()), (3, out.data_ptr()), (5, len(out))]
        if bias is not None:
            changes.append((2, bias.data_ptr()))
        launch.run(stream, changes)


_GATHER = Shape(1, 1, 1, 4)
_PREPARE = Shape(1, 1, 1, 8)


def _optional(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [_NULL if tensor is None else tensor for tensor in tensors]


_NULL = torch.empty(0)
"""Stands for a null pointer: a tensor without elements has the address 0."""


def _factor(matrix: PackedMatrix) -> int:
    """Returns 2^base as two bfloat16 in one word."""
    exponent = (matrix.base + _BF16_ONE) << 7 if matrix.is_bf16 else 0
    return exponent << 16 | exponent


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels compile for a device: they need NVRTC and matrix units for bfloat16."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        kernel_of("packed_unpack", 8, False, Shape(1, 1, 1, _UNPACK_WARPS), device)
    except UnsupportedEnvironmentError:
        return False
    return True


_compiling = threading.Lock()


def kernel_of(name: str, bits: int, is_half: bool, shape: Shape, device: torch.device) -> Kernel:
    """Returns a compiled kernel of `linear.cu`; a process compiles each setting once (0.3 s).

    Raises:
        UnsupportedEnvironmentError: it cannot be compiled here.
    """
    with _compiling:
        return _kernel_of(name, bits, is_half, shape, device)


@cache
def _kernel_of(name: str, bits: int, is_half: bool, shape: Shape, device: torch.device) -> Kernel:
    return Kernel(source_of(bits, is_half, shape), name, device)


def source_of(bits: int, is_half: bool, shape: Shape) -> str:
    """Returns the source of the kernels for a setting."""
    macros = {
        "BITS": bits,
        "IS_HALF": int(is_half),
        "ROW_TILES": shape.row_tiles,
        "TOKEN_TILES": shape.token_tiles,
        "ROW_WARPS": shape.row_warps,
        "COL_WARPS": shape.col_warps,
    }
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    return "\n".join([*lines, _SOURCE.read_text(encoding="utf-8")])
