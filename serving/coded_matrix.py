"""A matrix whose codes stay 8 bits in an engine's memory, and its products as operations."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from codecllm.loader.resident.escapes import Escapes, split_codes
from codecllm.loader.resident.int8_matmul import dequantize_rows
from codecllm.loader.resident.scaled_codes import ScaledCodes

Matrix = ScaledCodes | torch.Tensor
"""Codes, or the weights themselves where codes of 8 bits and escapes would save nothing."""


def make_matrix(
    codes: torch.Tensor, scale: torch.Tensor, col_scale: torch.Tensor | None, dtype: torch.dtype
) -> Matrix:
    """Returns the matrix of codes; as weights where too many codes need 16 bits.

    Args:
        codes: int8 or int16 [rows, cols].
        scale: float32 [rows].
        col_scale: float32 [cols], or None.
        dtype: of weights.
    """
    split = split_codes(codes)
    if split is None:
        return dequantize_rows(codes, scale, dtype, col_scale)
    return ScaledCodes(split[0], scale, col_scale, split[1])


_LIBRARY = torch.library.Library("codecllm", "FRAGMENT")
_PARTS = (
    "Tensor codes, Tensor scale, Tensor? col_scale, "
    "Tensor? first, Tensor? column, Tensor? extra, int longest"
)


def _matrix(
    codes: torch.Tensor,
    scale: torch.Tensor,
    col_scale: torch.Tensor | None,
    first: torch.Tensor | None,
    column: torch.Tensor | None,
    extra: torch.Tensor | None,
    longest: int,
) -> ScaledCodes:
    escapes = None
    if first is not None and column is not None and extra is not None:
        escapes = Escapes(first, column, extra, longest)
    return ScaledCodes(codes, scale, col_scale, escapes)


def _parts(matrix: ScaledCodes) -> list[torch.Tensor | int | None]:
    """Returns the arguments of `_matrix`."""
    escapes, codes = matrix.escapes, (matrix.codes, matrix.scale, matrix.col_scale)
    if escapes is None:
        return [*codes, None, None, None, 0]
    return [*codes, escapes.first, escapes.column, escapes.extra, escapes.longest]


def _product(inputs: torch.Tensor, bias: torch.Tensor | None, *parts: Any) -> torch.Tensor:
    return _matrix(*parts).product(inputs, bias)


def _gather(rows: torch.Tensor, dtype: torch.dtype, *parts: Any) -> torch.Tensor:
    return _matrix(*parts).gather(rows, dtype)


# Defined as libraries do that are called often: `torch.library.custom_op` costs a call of Python
# more. A compiler sees one operation: it could not follow how a kernel is chosen.
_LIBRARY.define(f"coded_product(Tensor inputs, Tensor? bias, {_PARTS}) -> Tensor")
_LIBRARY.define(f"coded_rows(Tensor rows, ScalarType dtype, {_PARTS}) -> Tensor")
_LIBRARY.impl("coded_product", _product, "CompositeExplicitAutograd")
_LIBRARY.impl("coded_rows", _gather, "CompositeExplicitAutograd")
torch.library.register_fake(
    "codecllm::coded_product",
    lambda inputs, bias, codes, *_: inputs.new_empty(*inputs.shape[:-1], codes.shape[0]),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "codecllm::coded_rows",
    lambda rows, dtype, codes, *_: rows.new_empty(*rows.shape, codes.shape[1], dtype=dtype),
    lib=_LIBRARY,
)


def coded_product(inputs: torch.Tensor, bias: torch.Tensor | None, matrix: Matrix) -> torch.Tensor:
    """Computes `inputs @ weights.T + bias`; of codes as one operation of the compiler."""
    if isinstance(matrix, torch.Tensor):
        return functional.linear(inputs, matrix, bias)
    result: torch.Tensor = torch.ops.codecllm.coded_product(inputs, bias, *_parts(matrix))
    return result


def coded_rows(rows: torch.Tensor, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """Returns rows of the weights, `dtype` [*rows.shape, cols]; see `coded_product`."""
    if isinstance(matrix, torch.Tensor):
        return functional.embedding(rows, matrix)
    result: torch.Tensor = torch.ops.codecllm.coded_rows(rows, dtype, *_parts(matrix))
    return result
