"""Modules that keep int8 codes and float32 scales in memory and dequantize where they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

DEQUANTIZE_ELEMENTS = 1 << 20
"""Elements dequantized at once: the float32 intermediate is 4 MiB."""

SCRATCH_ELEMENTS = 1 << 26
"""Most elements of a weight that exist dequantized at once; a larger weight (a vocabulary) is multiplied in blocks of rows."""


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns cast(fl32(code * scale)): the very bits that dense loading puts into memory.

    Args:
        codes: int8 [rows, cols].
        scale: float32 [rows].
        dtype: dtype of the result.

    Returns:
        `dtype` [rows, cols].
    """
    rows, cols = codes.shape
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    step = max(1, DEQUANTIZE_ELEMENTS // max(1, cols))
    for first in range(0, rows, step):
        block = slice(first, first + step)
        out[block] = codes[block].to(torch.float32).mul_(scale[block, None])
    return out


def int8_linear(inputs: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Computes `inputs @ dequantized(codes, scale).T + bias` in the dtype of `inputs`.

    Args:
        inputs: float [..., in].
        codes: int8 [out, in].
        scale: float32 [out].
        bias: [out] or None.

    Returns:
        [..., out], dtype of `inputs`.
    """
    rows, cols = codes.shape
    step = max(1, SCRATCH_ELEMENTS // max(1, cols))
    if rows <= step:
        return functional.linear(inputs, dequantize_rows(codes, scale, inputs.dtype), bias)
    step = max(64, step // 64 * 64)
    parts = []
    for first in range(0, rows, step):
        block = slice(first, first + step)
        weight = dequantize_rows(codes[block], scale[block], inputs.dtype)
        parts.append(functional.linear(inputs, weight, None if bias is None else bias[block]))
    return torch.cat(parts, dim=-1)


class Int8Linear(nn.Linear):
    """A linear layer whose `weight` is int8 [out, in], with float32 `weight_scale` [out] as a buffer."""

    weight_scale: torch.Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Returns an uninitialised twin of `linear` on its device; the bias is taken over."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        twin.in_features, twin.out_features = linear.in_features, linear.out_features
        twin.register_parameter("weight", _empty_codes(linear.weight))
        twin.register_parameter("bias", linear.bias)
        twin.register_buffer("weight_scale", _empty_scale(linear.weight))
        twin.train(linear.training)
        return twin

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps float [..., in] to [..., out] of the same dtype."""
        return int8_linear(inputs, self.weight, self.weight_scale, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Linear:
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _keep_float32(self, scale)
        return self


class Int8Embedding(nn.Embedding):
    """An embedding whose `weight` is int8 [vocabulary, width], with float32 `weight_scale` [vocabulary] as a buffer.

    Attributes:
        output_dtype: dtype of the vectors it returns; follows `model.to(dtype)`.
    """

    weight_scale: torch.Tensor
    output_dtype: torch.dtype

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Int8Embedding:
        """Returns an uninitialised twin of `embedding` on its device."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"):
            setattr(twin, name, getattr(embedding, name))
        twin.scale_grad_by_freq, twin.sparse = embedding.scale_grad_by_freq, embedding.sparse
        twin.output_dtype = embedding.weight.dtype
        twin.register_parameter("weight", _empty_codes(embedding.weight))
        twin.register_buffer("weight_scale", _empty_scale(embedding.weight))
        twin.train(embedding.training)
        return twin

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps integer [...] to `output_dtype` [..., width]."""
        rows = ids.reshape(-1)
        vectors = dequantize_rows(self.weight[rows], self.weight_scale[rows], self.output_dtype)
        return vectors.view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Embedding:
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _keep_float32(self, scale)
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype, device=scale.device)).dtype
        return self


def int8_twin(module: nn.Module) -> Int8Linear | Int8Embedding | None:
    """Returns an uninitialised int8 module in place of a plain linear layer or embedding; None for anything else.

    Subclasses are left alone: their forward may do more than a product or a look-up.
    """
    if type(module) is nn.Linear:
        return Int8Linear.from_linear(module)
    if type(module) is nn.Embedding and module.max_norm is None:
        return Int8Embedding.from_embedding(module)
    return None


def _empty_codes(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)


def _empty_scale(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)


def _keep_float32(module: Any, scale: torch.Tensor) -> None:
    """Undoes a cast of the scales: `model.to(bfloat16)` moves them, but they stay float32."""
    if module.weight_scale.dtype != torch.float32:
        device = module.weight_scale.device
        module.weight_scale = torch.empty_like(scale, device=device) if device.type == "meta" else scale.to(device)
