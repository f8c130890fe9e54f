"""The packed layout: reference, packing on a device, kernels (emulated) and their products."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from codecllm.loader.packed import kernels, layout, matrix, on_gpu, pack, product, warpgroups, warps
from codecllm.loader.resident import int8_matmul
from tests.loader import block_emulation

ALL_BITS = [*layout.INT_BITS, layout.BF16_BITS]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_words_hold_every_value_in_exactly_its_bits(bits):
    values = np.random.default_rng(bits).integers(0, 1 << bits, (48, 192)).astype(np.uint32)
    words = layout.pack_values(values, bits)
    assert words.nbytes * 8 == bits * values.size
    assert (layout.unpack_values(words, bits) == values).all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_packing_on_a_device_gives_the_words_of_the_reference(bits, monkeypatch):
    monkeypatch.setattr(pack, "BLOCK_ELEMENTS", 16 * 192)  # one row tile at a time
    values = np.random.default_rng(bits).integers(0, 1 << bits, (48, 192)).astype(np.uint32)
    words = pack.pack_values(torch.from_numpy(values.astype(np.int32)), bits)
    assert (words.numpy().view(np.uint32) == layout.pack_values(values, bits)).all()
    assert (pack.unpack_values(words, bits).numpy() == values).all()


@pytest.mark.parametrize("base", [0, 1, 60, 110, 127])
def test_all_bf16_patterns_survive_splitting(base):
    patterns = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    values, outside = layout.split_bf16(patterns, base)
    joined = layout.join_bf16(values, base)
    assert (joined[~outside] == patterns[~outside]).all()
    assert (joined[outside] == 0).all()
    weights = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)
    fast, fast_outside = pack.split_bf16(weights, base)
    assert (fast.numpy() == values).all()
    assert (fast_outside.numpy() == outside).all()


def test_rows_of_large_weights_have_few_exceptions():
    weights = _weights(512, 1024)
    weights[100] *= 8  # many of them at the least number of exceptions
    packed = matrix.pack_bf16(weights)
    assert (_bits(matrix.unpack_bf16(packed)) == _bits(weights)).all()
    counts = np.bincount((_bits(weights).numpy() >> 7 & 0xFF)[(weights != 0).numpy()])
    fewest = max(range(128), key=lambda base: counts[base + 1 : base + 16].sum())
    _, outside = pack.split_bf16(weights, fewest)
    assert outside.sum() <= len(packed.entries) <= 2 * outside.sum()
    assert 10 * packed.longest < outside.sum(1).max()


def test_a_base_never_costs_many_exceptions():
    def counts(inside):
        return [0] * 101 + [30] + [inside] * 14 + [25] + [0] * 139

    assert layout.best_base(counts(10_000)) == 101
    assert layout.best_base(counts(100)) == 100  # 30 exceptions are more than 1 %


def _weights(rows, cols, seed=0):
    """bfloat16 weights with zeros of both signs, subnormals, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(rows, cols, generator=generator) * 0.02).bfloat16()
    flat = weights.view(-1)
    flat[::11] = 0.0
    flat[1::41] = -0.0
    return weights


def _codes(rows, cols, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(rows, cols, generator=generator) * spread).round().to(torch.int16)
    scale = torch.rand(rows, generator=generator) + 0.1
    return codes, scale, torch.rand(cols, generator=generator) + 0.5


def _bits(tensor):
    return tensor.view(torch.int16)


@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (16, 64), (33, 80), (100, 208)])
def test_a_matrix_of_bf16_gives_back_every_bit(rows, cols, monkeypatch):
    monkeypatch.setattr(matrix, "MAX_EXCEPTION_SHARE", 1.0)
    weights = _weights(rows, cols)
    weights.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, 3e38])
    packed = matrix.pack_bf16(weights)
    assert (_bits(matrix.unpack_bf16(packed)) == _bits(weights)).all()
    picked = torch.tensor([rows - 1, 0, rows // 2])
    assert (_bits(matrix.gather(packed, picked, torch.bfloat16)) == _bits(weights[picked])).all()


def test_all_patterns_are_packed_and_unpacked(monkeypatch):
    monkeypatch.setattr(matrix, "MAX_EXCEPTION_SHARE", 1.0)
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(256, 256)
    packed = matrix.pack_bf16(patterns.view(torch.bfloat16))
    assert (_bits(matrix.unpack_bf16(packed)) == patterns).all()


def test_a_matrix_with_many_exceptions_is_refused():
    weights = torch.logspace(-30, 30, 1024).bfloat16().view(16, 64)
    assert matrix.pack_bf16(weights) is None


@pytest.mark.parametrize("spread", [0.6, 3, 12, 50, 70])
@pytest.mark.parametrize("with_columns", [False, True])
def test_codes_give_the_bits_of_dense_loading(spread, with_columns):
    codes, scale, col_scale = _codes(100, 208, spread)
    col_scale = col_scale if with_columns else None
    packed = matrix.pack_codes(codes, scale, col_scale)
    assert packed.bits == layout.best_int_bits(codes.numpy().astype(np.int32))
    assert (matrix.unpack_codes(packed) == codes).all()
    steps = scale[:, None] if col_scale is None else scale[:, None] * col_scale
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weights = (codes.float() * steps).to(dtype)
        assert (matrix.dequantize(packed, dtype) == weights).all()
        picked = torch.tensor([99, 0, 7, 7])
        assert (matrix.gather(packed, picked, dtype) == weights[picked]).all()


def test_codes_take_the_bits_that_are_asked_for():
    codes, scale, col_scale = _codes(100, 208, 50)
    packed = matrix.pack_codes(codes, scale, col_scale, 8)
    assert packed.bits == 8
    assert (matrix.unpack_codes(packed) == codes).all()
    assert matrix.pack_codes(codes, scale, col_scale, 4) is None  # most would be exceptions


@pytest.fixture
def emulated(monkeypatch):
    for module in (kernels, product, warps, warpgroups):
        monkeypatch.setattr(module, "kernel_of", block_emulation.emulated_kernel)
    monkeypatch.setattr(product, "fuses", lambda matrix, inputs: True)
    monkeypatch.setattr(product, "has_groups", lambda device: False)
    monkeypatch.setattr(product, "current_stream", lambda device: 0)
    monkeypatch.setattr(product, "on_device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(product.PackedProduct, "_has_unpack", lambda self, dtype: True)


@pytest.fixture
def packing(monkeypatch):
    monkeypatch.setattr(on_gpu, "kernel_of", block_emulation.emulated_kernel)


def _same(packed, other):
    assert packed.tensors().keys() == other.tensors().keys()
    for name, tensor in packed.tensors().items():
        assert tensor.dtype == other.tensors()[name].dtype
        assert (tensor == other.tensors()[name]).all(), name
    assert (packed.bits, packed.base, packed.longest) == (other.bits, other.base, other.longest)


@pytest.mark.parametrize(("rows", "cols"), [(16, 64), (37, 80), (40, 1104)])
def test_the_kernels_pack_bf16_as_the_reference(packing, monkeypatch, rows, cols):
    weights = _weights(rows, cols)
    weights.view(-1)[5::97] = 3e38
    weights.view(-1)[rows * cols // 2 :][:4] = torch.tensor([float("nan"), float("inf"), 1e-40, 0])
    expected = matrix.pack_bf16(weights)
    monkeypatch.setattr(on_gpu, "packs", lambda matrix: True)
    _same(matrix.pack_bf16(weights), expected)
    assert expected.first is not None


@pytest.mark.parametrize("bits", layout.INT_BITS)
@pytest.mark.parametrize(("dtype", "cols"), [(torch.int8, 80), (torch.int16, 1104)])
def test_the_kernels_pack_codes_as_the_reference(packing, monkeypatch, bits, dtype, cols):
    codes, scale, col_scale = _codes(37, cols, 2.0 ** (bits - 2.6), seed=bits)
    if dtype == torch.int8:
        codes = codes.clamp(-128, 127)
    expected = matrix.pack_codes(codes, scale, col_scale)
    monkeypatch.setattr(on_gpu, "packs", lambda matrix: True)
    _same(matrix.pack_codes(codes.to(dtype), scale, col_scale), expected)


def test_the_kernels_refuse_many_exceptions(packing, monkeypatch):
    monkeypatch.setattr(on_gpu, "packs", lambda matrix: True)
    assert matrix.pack_bf16(torch.logspace(-30, 30, 1024).bfloat16().view(16, 64)) is None
    assert matrix.pack_codes(*_codes(100, 208, 50), 4) is None


SHAPES = [
    warps.Shape(1, 1, 1, 1, stages=3),
    warps.Shape(2, 2, 2, 1, stages=2),
    warps.Shape(2, 2, 2, 2, splits=3),
]
"""With rings that are filled once, and several times."""


def _expected(inputs, weights, bias):
    exact = inputs.double() @ weights.double().T
    return exact if bias is None else exact + bias.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [*((bits, torch.bfloat16) for bits in layout.INT_BITS), (5, torch.float16), (8, torch.float16)],
)
def test_products_with_codes(emulated, monkeypatch, bits, dtype, tokens, shape):
    monkeypatch.setattr(warps, "choose_shape", lambda *_: shape)
    codes, scale, col_scale = _codes(50, 208, 2.0 ** (bits - 2.6), seed=bits)
    monkeypatch.setattr(pack, "choose_int_bits", lambda codes: bits)
    packed = matrix.pack_codes(codes, scale, col_scale if bits % 2 else None)
    assert packed.first is not None
    inputs = torch.randn(tokens, 208, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(50).to(dtype) if tokens > 1 else None
    scaled = (inputs * col_scale).to(dtype) if bits % 2 else inputs
    got = product.PackedProduct(packed).linear(inputs, bias)
    exact = _expected(scaled, codes.double() * scale.double()[:, None], bias)
    epsilon = torch.finfo(dtype).eps
    assert ((got.double() - exact).abs() <= epsilon * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_products_with_bf16_weights(emulated, monkeypatch, tokens, shape):
    if tokens > 8 * shape.token_tiles:
        shape = warps.Shape(1, 2, 1, 2)
    monkeypatch.setattr(warps, "choose_shape", lambda *_: shape)
    weights = _weights(50, 208)
    weights[3, 7], weights[49, 207], weights[0, 0] = 1e-30, 2e10, -1e-39
    packed = matrix.pack_bf16(weights)
    assert packed.first is not None
    inputs = torch.randn(tokens, 208).bfloat16()
    got = product.PackedProduct(packed).linear(inputs, None)
    exact = _expected(inputs, weights, None)
    assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


HOPPER_SHARED = 227 << 10
"""Bytes of shared memory of a block there."""

GROUP_SHAPES = [
    warpgroups.GroupShape(2, 1, 1, stages=2),
    warpgroups.GroupShape(2, 2, 2, stages=3),
    warpgroups.GroupShape(2, 1, 2, stages=2, step_tiles=2),
    warpgroups.GroupShape(4, 1, 4, stages=2),
    warpgroups.GroupShape(8, 4, 1, stages=2),
]


@pytest.mark.parametrize("shape", GROUP_SHAPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [*((bits, torch.bfloat16) for bits in layout.INT_BITS), (6, torch.float16)],
)
def test_products_of_warpgroups_with_codes(emulated, monkeypatch, bits, dtype, shape):
    monkeypatch.setattr(product, "has_groups", lambda device: True)
    monkeypatch.setattr(warpgroups, "choose_group_shape", lambda *_: shape)
    codes, scale, col_scale = _codes(150, 336, 2.0 ** (bits - 2.6), seed=bits)
    codes[140] = 0
    codes[140, 5] = 300
    monkeypatch.setattr(pack, "choose_int_bits", lambda codes: bits)
    packed = matrix.pack_codes(codes, scale, col_scale if bits % 2 else None)
    inputs = torch.randn(13, 336, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(150).to(dtype) if bits > 4 else None
    scaled = (inputs * col_scale).to(dtype) if bits % 2 else inputs
    got = product.PackedProduct(packed).linear(inputs, bias)
    exact = _expected(scaled, codes.double() * scale.double()[:, None], bias)
    epsilon = torch.finfo(dtype).eps
    assert ((got.double() - exact).abs() <= epsilon * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("tokens", [9, 70, 130])
def test_products_of_warpgroups_with_bf16_weights(emulated, monkeypatch, tokens):
    monkeypatch.setattr(product, "has_groups", lambda device: True)
    shape = warpgroups.GroupShape(2 if tokens <= 16 else 16, 1, 2, stages=2)
    monkeypatch.setattr(warpgroups, "choose_group_shape", lambda *_: shape)
    weights = _weights(50, 208)
    weights[3, 7], weights[49, 207], weights[0, 0] = 1e-30, 2e10, -1e-39
    packed = matrix.pack_bf16(weights)
    inputs = torch.randn(tokens, 208).bfloat16()
    got = product.PackedProduct(packed).linear(inputs, None)
    exact = _expected(inputs, weights, None)
    assert ((got.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_unpacking_gives_the_bits_of_dense_loading(emulated, monkeypatch, bits):
    if bits == layout.BF16_BITS:
        monkeypatch.setattr(matrix, "MAX_EXCEPTION_SHARE", 1.0)
        weights = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(256, 256)
        weights = weights.view(torch.bfloat16)
        packed = matrix.pack_bf16(weights)
    else:
        codes, scale, col_scale = _codes(70, 208, 2.0 ** (bits - 2.6), seed=bits)
        monkeypatch.setattr(pack, "choose_int_bits", lambda codes: bits)
        packed = matrix.pack_codes(codes, scale, col_scale)
        weights = (codes.float() * (scale[:, None] * col_scale)).bfloat16()
    whole = product.PackedProduct(packed)
    assert (_bits(whole.dense(torch.bfloat16)) == _bits(weights)).all()
    rows = torch.tensor([0, len(weights) - 1, 8, 8, 23])
    assert (_bits(whole.gather(rows, torch.bfloat16)) == _bits(weights[rows])).all()


def test_a_large_matrix_is_multiplied_in_blocks_of_rows(emulated, monkeypatch):
    monkeypatch.setattr(product, "fuses", lambda matrix, inputs: False)
    monkeypatch.setattr(int8_matmul, "SCRATCH_ELEMENTS", 32 * 208)
    codes, scale, col_scale = _codes(70, 208, 10)
    packed = matrix.pack_codes(codes, scale, col_scale)
    inputs, bias = torch.randn(3, 208).bfloat16(), torch.randn(70).bfloat16()
    weights = (codes.float() * (scale[:, None] * col_scale)).bfloat16()
    got = product.PackedProduct(packed).linear(inputs, bias)
    assert (got == torch.nn.functional.linear(inputs, weights, bias)).all()


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32, 33, 64])
def test_the_chosen_shape_fits_a_block_and_the_tokens(tokens):
    sizes = [(rows, cols) for rows in (16, 4096, 128256) for cols in (64, 4096, 14336)]
    for (rows, cols), bits in itertools.product(sizes, ALL_BITS):
        shape = warps.choose_shape(tokens, rows, cols, bits, kernels.LEAST_SHARED)
        assert 8 * shape.token_tiles >= tokens
        static = 4 * 8 * shape.rows * (shape.col_warps + 1)
        assert static <= 48 << 10
        assert shape.shared(bits) + static <= kernels.LEAST_SHARED
        assert shape.token_tiles > 1 or shape.threads >= shape.rows
        assert shape.threads <= 1024
        assert shape.stages >= 2


@pytest.mark.parametrize("tokens", [9, 16, 17, 64, 100, 256])
def test_the_chosen_shape_of_warpgroups_fits_a_block_and_the_tokens(tokens):
    sizes = [(rows, cols) for rows in (16, 4096, 128256) for cols in (64, 4096, 14336)]
    for (rows, cols), bits in itertools.product(sizes, ALL_BITS):
        shape = warpgroups.choose_group_shape(tokens, rows, cols, bits, HOPPER_SHARED)
        assert shape.shared(bits) <= HOPPER_SHARED
        assert min(8 * shape.token_tiles, 64) % shape.splits == 0
