"""Products with packed matrices: which kernel multiplies how many inputs, and its launch.

A few inputs are multiplied by `warps`, more by `warpgroups` where the device has the instructions.
Both read each packed word once and sum in float32. For codes they apply the row's scale to the sum,
so a result differs from that of dense weights by the rounding of these weights, at most 2^-9 of
each product for bfloat16 (2^-12 for float16), beside the order of summation. Products with bfloat16
weights use exactly these weights. More inputs, other dtypes and other devices: the weights are
unpacked into scratch and multiplied by cuBLAS, with the bits of a dense layer.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from codecllm.loader.kernels.on_device import current_stream, on_device_of
from codecllm.loader.packed import warpgroups, warps
from codecllm.loader.packed.kernels import (
    UNPACK_THREADS,
    Launches,
    capability,
    has_kernels,
    kernel_of,
    optional,
    unpack_source,
)
from codecllm.loader.packed.layout import TILE_ROWS
from codecllm.loader.packed.matrix import PackedMatrix, dequantize, gather
from codecllm.loader.resident.int8_matmul import product_by_blocks

Plan = warps.WarpPlan | warpgroups.GroupPlan

FEW = 8
"""Most inputs that single warps multiply where warpgroups can."""


def has_groups(device: torch.device) -> bool:
    """Whether a device has the matrix units of `warpgroups`."""
    return capability(device) == warpgroups.HOPPER


def fuses(matrix: PackedMatrix, inputs: torch.Tensor) -> bool:
    """Whether a kernel multiplies these inputs with packed weights."""
    tokens = inputs.numel() // matrix.cols
    dtypes = (torch.bfloat16,) if matrix.is_bf16 else (torch.bfloat16, torch.float16)
    if tokens == 0 or inputs.dtype not in dtypes or not has_kernels(inputs.device):
        return False
    most = warpgroups.MAX_TOKENS if has_groups(inputs.device) else warps.MAX_TOKENS
    return tokens <= most


class PackedProduct:
    """The products of one matrix; keeps prepared launches for the shapes that were used."""

    def __init__(self, matrix: PackedMatrix) -> None:
        """Keeps the matrix."""
        self.matrix = matrix
        self._plans: dict[tuple[int, torch.dtype, bool, int], Plan] = {}
        self._launches = Launches()

    def linear(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns `inputs @ weight.T + bias`.

        Args:
            inputs: float [..., cols] on the matrix's device.
            bias: [rows] of the same dtype, or None.

        Returns:
            [..., rows], dtype of `inputs`.
        """
        key = (inputs.numel(), inputs.dtype, bias is None, inputs.get_device())
        plan = self._plans.get(key)
        if plan is None:
            if not fuses(self.matrix, inputs):
                return self._by_scratch(inputs, bias)
            plan = self._plans[key] = self._plan(inputs, bias)
        flat = inputs
        if not inputs.is_contiguous() or inputs.data_ptr() % 16:
            flat = inputs.clone(memory_format=torch.contiguous_format)
        out = inputs.new_empty(*inputs.shape[:-1], self.matrix.rows)
        with on_device_of(flat):
            plan.run(flat, bias, out, current_stream(flat.device))
        return out

    def _plan(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> Plan:
        tokens = inputs.numel() // self.matrix.cols
        if tokens > FEW and has_groups(inputs.device):
            return warpgroups.plan(self.matrix, self._launches, tokens, inputs, bias)
        return warps.plan(self.matrix, self._launches, tokens, inputs, bias)

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
        kernel = kernel_of("packed_gather", unpack_source(matrix.bits, is_half), rows.device)
        arguments: list[torch.Tensor | int] = [
            matrix.words,
            rows.to(torch.int64).contiguous(),
            *optional(matrix.first, matrix.entries, matrix.scale, matrix.col_scale),
            out,
            matrix.rows,
            matrix.cols,
            matrix.factor,
        ]
        kernel.launch(len(rows), UNPACK_THREADS, 0, arguments)
        return out

    def _has_unpack(self, dtype: torch.dtype) -> bool:
        matrix = self.matrix
        fits = dtype == torch.bfloat16 or (dtype == torch.float16 and not matrix.is_bf16)
        return fits and has_kernels(matrix.words.device)

    def _unpacked(self, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Returns rows of the weights from `start`, a multiple of 16, to `stop`."""
        matrix = self.matrix
        out = torch.empty(stop - start, matrix.cols, dtype=dtype, device=matrix.words.device)
        is_half = dtype == torch.float16
        kernel = kernel_of("packed_unpack", unpack_source(matrix.bits, is_half), out.device)
        first = None if matrix.first is None else matrix.first[start:]
        scale = None if matrix.scale is None else matrix.scale[start:]
        arguments: list[torch.Tensor | int] = [
            matrix.words[start // TILE_ROWS :],
            *optional(first, matrix.entries, scale, matrix.col_scale),
            out,
            stop - start,
            matrix.cols,
            matrix.factor,
        ]
        blocks = -(-(stop - start) // TILE_ROWS)
        kernel.launch(blocks, UNPACK_THREADS, 0, arguments)
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
