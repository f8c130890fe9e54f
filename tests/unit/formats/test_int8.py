"""Scheme `int8` against exact rational arithmetic (SPEC.md 7.3)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from codecllm.formats.errors import DecodeError
from codecllm.formats.schemes.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.schemes.int8 import (
    MAX_CODE,
    MAX_SCALE,
    MIN_SCALE,
    channel_scales,
    check_codes,
    check_scales,
    dequantize,
    quantize,
)
from tests.unit.formats.exact import bits_of, fl32, rounded

FLOAT_MAX = float(np.finfo(np.float32).max)
ABSMAX = [
    1.0,
    127.0,
    0.1,
    3.0,
    1e-3,
    6.1e-5,
    1e10,
    1e-37,
    FLOAT_MAX,
    FLOAT_MAX * (1 - 2**-20),
    127 * MIN_SCALE,
    2.0**-119,
]


def _float32_samples(count):
    """Finite float32 of every size."""
    words = (
        np.random.default_rng(3)
        .integers(0, 1 << 32, count * 2, dtype=np.uint64)
        .astype(np.uint32)
        .view(np.float32)
    )
    return words[np.isfinite(words)][:count]


@pytest.mark.parametrize("absmax", ABSMAX)
def test_scales_are_the_rounded_quotient(absmax):
    absmax = np.float32(absmax)
    expected = min(fl32(Fraction(float(absmax)) / 127), Fraction(MAX_SCALE))
    assert Fraction(float(channel_scales(np.array([absmax]))[0])) == expected


def test_scales_of_many_channels():
    absmax = np.abs(_float32_samples(2000))
    for got, value in zip(channel_scales(absmax).tolist(), absmax.tolist(), strict=True):
        assert Fraction(got) == min(fl32(Fraction(value) / 127), Fraction(MAX_SCALE))


def test_a_channel_of_zeros_has_scale_one():
    assert channel_scales(np.array([0.0, -0.0, 2.0], np.float32)).tolist()[:2] == [1.0, 1.0]
    assert quantize(np.zeros(3, np.float32), np.float32(1.0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("absmax", ABSMAX)
def test_codes_are_the_rounded_quotient(absmax):
    rng = np.random.default_rng(int(np.float32(absmax).view(np.uint32)))
    weights = (rng.uniform(-1, 1, 300) * absmax).astype(np.float32)
    weights[:2] = absmax, -absmax
    scale = channel_scales(np.abs(weights).max(keepdims=True))
    codes = quantize(weights, scale)
    assert codes[:2].tolist() == [MAX_CODE, -MAX_CODE]
    for code, weight in zip(codes.tolist(), weights.tolist(), strict=True):
        assert code == round(fl32(Fraction(weight) / Fraction(float(scale[0]))))
        step = Fraction(float(scale[0]))
        assert abs(Fraction(weight) - code * step) <= step / 2 * (1 + Fraction(1, 1 << 15))


def test_ties_go_to_the_even_code():
    halves = np.arange(-126.5, 127, 1.0, dtype=np.float32)
    assert quantize(halves, np.float32(1.0)).tolist() == [
        round(Fraction(value)) for value in halves.tolist()
    ]


def test_codes_beyond_the_type_never_come_from_a_scale_of_ours():
    weights = np.abs(_float32_samples(5000))
    scales = channel_scales(weights)
    usable = (weights == 0) | (scales >= MIN_SCALE)
    assert set(quantize(weights[usable], scales[usable]).tolist()) <= {0, 127}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_all_codes_times_sampled_scales(dtype):
    """One product in float32, one rounding to the target: every code, scales of every size."""
    scales = [
        MIN_SCALE,
        2.0**-24 / 127,
        2.0**-30,
        1e-4,
        0.0123,
        1.0,
        1.0000001,
        515.78,
        517.0,
        1e30,
        MAX_SCALE,
    ]
    codes = np.arange(-127, 128).astype(np.int8)
    for scale in np.array(scales, np.float32):
        got = bits_from_float32(dequantize(codes, scale), dtype)
        for code, bits in zip(codes.tolist(), got.tolist(), strict=True):
            product = fl32(code * Fraction(float(scale)))
            assert bits == bits_of(rounded(product, dtype), dtype, code < 0), (scale, code)


def test_largest_scale_is_the_last_one():
    assert np.isfinite(dequantize(np.array([127, -127], np.int8), np.float32(MAX_SCALE))).all()
    check_scales(np.array([MIN_SCALE, 1.0, MAX_SCALE], np.float32))


@pytest.mark.parametrize(
    "scale",
    [
        *(np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1e-45),
        np.nextafter(np.float32(MIN_SCALE), np.float32(0)),
        np.nextafter(np.float32(MAX_SCALE), np.float32(np.inf)),
    ],
)
def test_scales_that_are_refused(scale):
    with pytest.raises(DecodeError, match="channel 2 is not allowed"):
        check_scales(np.array([1, 1, scale, 1], np.float32))


def test_code_that_is_refused():
    check_codes(np.arange(-127, 128).astype(np.int8))
    check_codes(np.empty(0, np.int8))
    with pytest.raises(DecodeError, match="-128"):
        check_codes(np.array([0, -128, 5], np.int8))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_rounding_of_sampled_values(dtype):
    samples = _float32_samples(3000)
    for value, bits in zip(
        samples.tolist(), bits_from_float32(samples, dtype).tolist(), strict=True
    ):
        assert bits == bits_of(rounded(Fraction(value), dtype), dtype, np.signbit(value)), value


def test_only_three_types_are_rounded_to():
    for call, argument in (
        (float32_from_bits, np.zeros(1, np.uint64)),
        (bits_from_float32, np.zeros(1, np.float32)),
    ):
        with pytest.raises(ValueError, match="F64"):
            call(argument, "F64")
