"""A matrix in codes of 8 bits and scales, and its products; a few codes may need more bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from codecllm.loader.resident.escapes import Escapes
from codecllm.loader.resident.int8_matmul import (
    DEQUANTIZE_ELEMENTS,
    can_fuse,
    can_pack,
    dequantize_rows,
    int8_product,
    product_by_blocks,
    transposed_product,
    transposed_product_by_blocks,
)


@dataclass(frozen=True, slots=True)
class ScaledCodes:
    """Codes and scales of one matrix [rows, cols].

    Attributes:
        codes: int8 [rows, cols].
        scale: float32 [rows].
        col_scale: float32 [cols], or None.
        escapes: what codes beyond 8 bits lack, or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    col_scale: torch.Tensor | None = None
    escapes: Escapes | None = None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weights, `dtype` [rows, cols], with the bits of dense loading."""
        return self._dense(0, len(self.codes), dtype)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns rows of the weights.

        Args:
            rows: int64 of any shape.
            dtype: dtype of the result.

        Returns:
            `dtype` [*rows.shape, cols].
        """
        flat = rows.reshape(-1)
        codes, scale = self.codes.index_select(0, flat), self.scale.index_select(0, flat)
        if self.escapes is None:
            values = dequantize_rows(codes, scale, dtype, self.col_scale)
        else:
            exact = self.escapes.add_to_rows(codes.to(torch.float32), flat)
            steps = scale[:, None] if self.col_scale is None else scale[:, None] * self.col_scale
            values = (exact * steps).to(dtype)
        return values.view(*rows.shape, codes.shape[1])

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns `inputs @ weights.T + bias`, [..., rows]; its rounding: `int8_matmul`."""
        if self.escapes is None:
            return int8_product(inputs, self.codes, self.scale, bias, self.col_scale)
        if can_fuse(inputs, self.codes) or can_pack(inputs, self.codes):
            return self._product_of_codes(inputs, bias)
        return product_by_blocks(
            inputs,
            bias,
            self.codes.shape,
            lambda block: self._dense(block.start, block.stop, inputs.dtype),
        )

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """Returns `grad @ weights`, [..., cols], for `grad` [..., rows]."""
        if self.escapes is None:
            return transposed_product(grad, self.codes, self.scale, self.col_scale)
        return transposed_product_by_blocks(
            grad, self.codes.shape, lambda block: self._dense(block.start, block.stop, grad.dtype)
        )

    def _product_of_codes(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert self.escapes is not None
        near = int8_product(inputs, self.codes, self.scale, None, self.col_scale)
        flat = inputs.reshape(-1, inputs.shape[-1])
        if self.col_scale is not None:
            flat = flat * self.col_scale
        rest = self.escapes.product(flat).mul_(self.scale).view(near.shape)
        whole = near.to(torch.float32).add_(rest)
        return (whole if bias is None else whole.add_(bias)).to(inputs.dtype)

    def _dense(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        if self.escapes is None:
            block = slice(start, stop)
            return dequantize_rows(self.codes[block], self.scale[block], dtype, self.col_scale)
        cols = self.codes.shape[1]
        out = torch.empty(stop - start, cols, dtype=dtype, device=self.codes.device)
        step = max(1, DEQUANTIZE_ELEMENTS // max(1, cols))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = self.codes[first:last].to(torch.float32)
            self.escapes.rows(first, last).add_to(values)
            steps = self.scale[first:last, None]
            values.mul_(steps if self.col_scale is None else steps * self.col_scale)
            out[first - start : last - start] = values
        return out
