"""Matrices of codes: the bits of dense weights, and products within their rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from codecllm.loader.packed.product import PackedProduct
from codecllm.loader.resident import int8_matmul
from codecllm.loader.resident.escapes import Escapes, split_codes
from codecllm.loader.resident.scaled_codes import ScaledCodes
from codecllm.serving import coded_matrix
from codecllm.serving.coded_matrix import (
    coded_product,
    coded_rows,
    make_matrix,
    pack_weights,
    unborn,
)

ROWS, COLS = 96, 64


def _codes(*, wide, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (ROWS, COLS), generator=generator, dtype=torch.int16)
    if not wide:
        return codes.to(torch.int8)
    for row, column, code in ((0, 0, 6684), (0, 63, -129), (7, 5, 128), (95, 63, -32_000)):
        codes[row, column] = code
    return codes


def _parts(*, wide, columns):
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(ROWS, generator=generator) * 0.01 + 0.001
    col_scale = torch.rand(COLS, generator=generator) + 0.5 if columns else None
    return _codes(wide=wide), scale, col_scale


def _expected(codes, scale, col_scale, dtype):
    steps = scale[:, None] if col_scale is None else scale[:, None] * col_scale
    return (codes.to(torch.float32) * steps).to(dtype)


EVERY = pytest.mark.parametrize(
    ("wide", "columns"), [(False, False), (False, True), (True, False), (True, True)]
)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_have_the_bits_of_dense_loading(wide, columns, dtype):
    parts = _parts(wide=wide, columns=columns)
    matrix = make_matrix(*parts, dtype)
    assert isinstance(matrix, ScaledCodes)
    assert matrix.codes.dtype == torch.int8
    assert (matrix.escapes is not None) == wide
    expected = _expected(*parts, dtype)
    assert torch.equal(matrix.dense(dtype), expected)
    rows = torch.tensor([[95, 0, 7], [0, 3, 95]])
    assert torch.equal(coded_rows(rows, dtype, matrix), expected[rows])
    assert torch.equal(coded_rows(rows[:0], dtype, matrix), expected[rows[:0]])


def _weights():
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(ROWS, COLS, generator=generator) * 0.02).to(torch.bfloat16)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_codes_are_the_weights_of_dense_loading(wide, columns, dtype):
    parts = _parts(wide=wide, columns=columns)
    matrix = make_matrix(*parts, dtype, packs=True)
    assert isinstance(matrix, PackedProduct)
    _is_dense(matrix, _expected(*parts, dtype))


@EVERY
def test_codes_of_8_bits_are_packed_where_the_kernels_run(wide, columns, monkeypatch):
    monkeypatch.setattr(coded_matrix, "has_kernels", lambda device: True)
    parts = _parts(wide=wide, columns=columns)
    matrix = make_matrix(*parts, torch.bfloat16)
    assert isinstance(matrix, PackedProduct)
    assert matrix.matrix.bits == 8
    assert torch.equal(matrix.dense(torch.bfloat16), _expected(*parts, torch.bfloat16))


def test_packed_weights_are_those_of_dense_loading():
    weights = _weights()
    matrix = pack_weights(weights)
    assert isinstance(matrix, PackedProduct)
    assert matrix.matrix.nbytes() < 0.8 * weights.nbytes
    _is_dense(matrix, weights)


def _is_dense(matrix, weights):
    inputs = torch.randn(2, 3, COLS, dtype=weights.dtype)
    bias = torch.randn(ROWS, dtype=weights.dtype)
    for one in (bias, None):
        expected = functional.linear(inputs, weights, one)
        assert torch.equal(coded_product(inputs, one, matrix), expected)
    rows = torch.tensor([[95, 0, 7], [0, 3, 95]])
    assert torch.equal(coded_rows(rows, weights.dtype, matrix), weights[rows])


@pytest.mark.parametrize(
    "weights", [torch.ones(ROWS, COLS), torch.ones(ROWS, 24, dtype=torch.bfloat16)]
)
def test_weights_without_a_packed_form_stay(weights):
    assert pack_weights(weights) is weights


def test_codes_without_a_packed_form_stay_codes():
    codes, scale, _ = _parts(wide=True, columns=False)
    matrix = make_matrix(codes[:, :24], scale, None, torch.bfloat16, packs=True)
    assert isinstance(matrix, ScaledCodes)


def test_a_packed_product_is_found_by_its_words_and_made_anew_without():
    matrix = pack_weights(_weights())
    inputs = torch.randn(3, COLS, dtype=torch.bfloat16)
    expected = coded_product(inputs, None, matrix)
    moved = PackedProduct(replace(matrix.matrix, words=matrix.matrix.words.clone()))
    assert torch.equal(coded_product(inputs, None, moved), expected)


@EVERY
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(wide, columns, tokens, dtype, has_bias):
    parts = _parts(wide=wide, columns=columns)
    matrix = make_matrix(*parts, dtype)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(2, tokens, COLS, generator=generator).to(dtype)
    bias = torch.randn(ROWS, generator=generator).to(dtype) if has_bias else None
    weight = _expected(*parts, dtype)
    got = coded_product(inputs, bias, matrix)
    if not int8_matmul.can_pack(inputs, matrix.codes):
        assert torch.equal(got, functional.linear(inputs, weight, bias))
        return
    exact = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    slack = inputs.double().abs() @ weight.double().abs().T
    assert ((got.double() - exact).abs() <= 2**-7 * (slack + exact.abs())).all()


def test_few_inputs_do_multiply_codes_where_the_kernel_is():
    codes, scale, _ = _parts(wide=True, columns=False)
    inputs = torch.ones(1, COLS, dtype=torch.bfloat16)
    matrix = make_matrix(codes, scale, None, torch.bfloat16)
    assert int8_matmul.can_pack(inputs, matrix.codes) == int8_matmul.HAS_PACKED_KERNEL


def test_too_many_wide_codes_become_weights():
    codes, scale, columns = _parts(wide=True, columns=True)
    codes[:, ::8] = 300
    matrix = make_matrix(codes, scale, columns, torch.bfloat16)
    expected = _expected(codes, scale, columns, torch.bfloat16)
    assert torch.equal(matrix, expected)
    inputs = torch.randn(3, COLS, dtype=torch.bfloat16)
    assert torch.equal(coded_product(inputs, None, matrix), functional.linear(inputs, expected))
    rows = torch.tensor([4, 0])
    assert torch.equal(coded_rows(rows, torch.bfloat16, matrix), expected[rows])


def test_escapes_hold_what_clipped_codes_lack():
    codes = _codes(wide=True)
    narrow, escapes = split_codes(codes)
    assert (narrow.abs() <= 127).all()
    assert len(escapes.column) == 4
    values = narrow.to(torch.float32)
    escapes.add_to(values)
    assert torch.equal(values.to(torch.int16), codes)
    inputs = torch.randn(3, COLS)
    lacking = codes.float() - narrow.float()
    torch.testing.assert_close(escapes.product(inputs), inputs @ lacking.T)
    picked = torch.tensor([7, 0, 1, 0])
    values = escapes.add_to_rows(narrow[picked].to(torch.float32), picked)
    assert torch.equal(values.to(torch.int16), codes[picked])


def test_wide_codes_that_all_fit_have_no_escapes():
    codes = _codes(wide=False).to(torch.int16)
    narrow, escapes = split_codes(codes)
    assert escapes is None
    assert torch.equal(narrow.to(torch.int16), codes)


def test_rows_of_escapes():
    first = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    escapes = Escapes(first, torch.tensor([1, 4, 0], dtype=torch.int32), torch.ones(3), 2)
    part = escapes.rows(1, 3)
    assert part.first.tolist() == [0, 0, 1]
    assert part.column.tolist() == [0]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_to_a_compiler_a_product_is_one_operation(wide, packs):
    matrix = make_matrix(*_parts(wide=wide, columns=True), torch.float32, packs=packs)
    inputs = torch.randn(2, 40, COLS)
    seen = []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(
        lambda values: coded_product(values, None, matrix), backend=look, fullgraph=True
    )
    assert torch.equal(compiled(inputs), coded_product(inputs, None, matrix))
    assert seen == [f"codecllm.{'packed' if packs else 'coded'}_product"]


def test_a_parameter_that_was_let_go_takes_no_memory_on_any_device():
    for device in (None, torch.device("cpu"), torch.device("meta")):
        left = unborn((300, 200), torch.int8, device)
        assert left.shape == (300, 200)
        assert left.untyped_storage().nbytes() == 1
