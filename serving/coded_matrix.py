"""A matrix that stays codes or packed weights in an engine's memory; its products as operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn import functional

from codecllm.loader.packed.kernels import has_kernels
from codecllm.loader.packed.matrix import PackedMatrix, can_pack, pack_bf16, pack_codes
from codecllm.loader.packed.product import PackedProduct
from codecllm.loader.resident.escapes import Escapes, split_codes
from codecllm.loader.resident.int8_matmul import dequantize_rows
from codecllm.loader.resident.scaled_codes import ScaledCodes

Matrix = ScaledCodes | PackedProduct | torch.Tensor
"""Codes, a packed matrix, or the weights themselves where neither would save anything."""


def unborn(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Returns a tensor of a shape with the memory of one element.

    It is made on its device: `to` would give it memory for every element.
    """
    return torch.zeros((), dtype=dtype, device=device).expand(*shape)


def make_matrix(
    codes: torch.Tensor,
    scale: torch.Tensor,
    col_scale: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    packs: bool = False,
) -> Matrix:
    """Returns the matrix of codes; as weights where too many codes need 16 bits.

    Args:
        codes: int8 or int16 [rows, cols].
        scale: float32 [rows].
        col_scale: float32 [cols], or None.
        dtype: of weights.
        packs: whether to pack them into the bits that they need, where they have a packed form;
            otherwise they keep 8 bits, packed where the kernels of packed codes run.
    """
    if can_pack(*codes.shape) and (packs or has_kernels(codes.device)):
        matrix = pack_codes(codes, scale, col_scale, None if packs else 8)
        if matrix is not None:
            return _prepared(matrix)
    split = split_codes(codes)
    if split is None:
        return dequantize_rows(codes, scale, dtype, col_scale)
    return ScaledCodes(split[0], scale, col_scale, split[1])


def pack_weights(weights: torch.Tensor) -> Matrix:
    """Returns the matrix of weights [rows, cols]: packed, or themselves without a packed form."""
    matrix = None
    if weights.dtype == torch.bfloat16 and can_pack(*weights.shape):
        matrix = pack_bf16(weights)
    return weights if matrix is None else _prepared(matrix)


_products: WeakValueDictionary[int, PackedProduct] = WeakValueDictionary()
"""Address of the words of a packed matrix -> its products, which keep prepared launches."""


def _prepared(matrix: PackedMatrix) -> PackedProduct:
    product = PackedProduct(matrix)
    _products[matrix.words.data_ptr()] = product
    return product


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


_PACKED_PARTS = (
    "Tensor words, Tensor? first, Tensor? entries, Tensor? scale, Tensor? col_scale, "
    "int rows, int cols, int bits, int base, int longest"
)


def _packed_parts(matrix: PackedMatrix) -> list[torch.Tensor | int | None]:
    """Returns the arguments of `_found`."""
    tensors = (matrix.words, matrix.first, matrix.entries, matrix.scale, matrix.col_scale)
    return [*tensors, matrix.rows, matrix.cols, matrix.bits, matrix.base, matrix.longest]


def _found(*parts: Any) -> PackedProduct:
    words, first, entries, scale, col_scale, rows, cols, bits, base, longest = parts
    product = _products.get(words.data_ptr())
    if product is None:  # a compiler's copy of the words
        tensors = (words, first, entries, scale, col_scale)
        product = PackedProduct(PackedMatrix(rows, cols, bits, base, *tensors, longest))
    return product


def _packed_product(inputs: torch.Tensor, bias: torch.Tensor | None, *parts: Any) -> torch.Tensor:
    return _found(*parts).linear(inputs, bias)


def _packed_gather(rows: torch.Tensor, dtype: torch.dtype, *parts: Any) -> torch.Tensor:
    product = _found(*parts)
    return product.gather(rows.reshape(-1), dtype).view(*rows.shape, product.matrix.cols)


# Defined as libraries do that are called often: `torch.library.custom_op` costs a call of Python
# more. A compiler sees one operation: it could not follow how a kernel is chosen.
_LIBRARY.define(f"coded_product(Tensor inputs, Tensor? bias, {_PARTS}) -> Tensor")
_LIBRARY.define(f"coded_rows(Tensor rows, ScalarType dtype, {_PARTS}) -> Tensor")
_LIBRARY.impl("coded_product", _product, "CompositeExplicitAutograd")
_LIBRARY.impl("coded_rows", _gather, "CompositeExplicitAutograd")
_LIBRARY.define(f"packed_product(Tensor inputs, Tensor? bias, {_PACKED_PARTS}) -> Tensor")
_LIBRARY.define(f"packed_rows(Tensor numbers, ScalarType dtype, {_PACKED_PARTS}) -> Tensor")
_LIBRARY.impl("packed_product", _packed_product, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_rows", _packed_gather, "CompositeExplicitAutograd")
torch.library.register_fake(
    "codecllm::packed_product",
    lambda inputs, bias, *parts: inputs.new_empty(*inputs.shape[:-1], parts[5]),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "codecllm::packed_rows",
    lambda rows, dtype, *parts: rows.new_empty(*rows.shape, parts[6], dtype=dtype),
    lib=_LIBRARY,
)
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
    result: torch.Tensor
    if isinstance(matrix, PackedProduct):
        result = torch.ops.codecllm.packed_product(inputs, bias, *_packed_parts(matrix.matrix))
        return result
    result = torch.ops.codecllm.coded_product(inputs, bias, *_parts(matrix))
    return result


def coded_rows(rows: torch.Tensor, dtype: torch.dtype, matrix: Matrix) -> torch.Tensor:
    """Returns rows of the weights, `dtype` [*rows.shape, cols]; see `coded_product`."""
    if isinstance(matrix, torch.Tensor):
        return functional.embedding(rows, matrix)
    result: torch.Tensor
    if isinstance(matrix, PackedProduct):
        result = torch.ops.codecllm.packed_rows(rows, dtype, *_packed_parts(matrix.matrix))
        return result
    result = torch.ops.codecllm.coded_rows(rows, dtype, *_parts(matrix))
    return result
