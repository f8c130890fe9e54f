"""Scheme `lossless` against the pseudo-code of SPEC.md 7.2, in Python integers."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import DecodeError
from codecllm.formats.schemes.lossless import join_planes, split_planes, word_dtype

PLANED = [dtype for dtype in DTYPES.values() if dtype.planes]


def _words(dtype):
    """Every pattern of types up to 16 bits.

    All powers of two, their neighbours and a sample of longer ones.
    """
    if dtype.name == "BOOL":
        return np.array([0, 1], np.uint8)
    if dtype.bits <= 16:
        return np.arange(1 << dtype.bits).astype(word_dtype(dtype))
    edges = {(1 << k) + d & ((1 << dtype.bits) - 1) for k in range(dtype.bits) for d in (-1, 0, 1)}
    rng = np.random.default_rng(dtype.bits)
    return np.concatenate(
        [
            np.array(sorted(edges), word_dtype(dtype)),
            rng.integers(0, 1 << dtype.bits, 1000, dtype=word_dtype(dtype)),
        ]
    )


def _planes_of(word, dtype):
    """The pseudo-code."""
    bits = dtype.bits
    if dtype.rotates:
        word = ((word << 1) | (word >> (bits - 1))) & ((1 << bits) - 1)
    return [(word >> (bits - 8 * (plane + 1))) & 255 for plane in range(bits // 8)]


@pytest.mark.parametrize("dtype", PLANED, ids=lambda dtype: dtype.name)
def test_planes_are_those_of_the_specification(dtype):
    words = _words(dtype)
    planes = split_planes(words, dtype)
    assert [plane.dtype for plane in planes] == [np.dtype(np.uint8)] * dtype.planes
    step = 1 if len(words) < 3000 else 7
    for index in range(0, len(words), step):
        assert [int(plane[index]) for plane in planes] == _planes_of(int(words[index]), dtype)


@pytest.mark.parametrize("dtype", PLANED, ids=lambda dtype: dtype.name)
def test_every_pattern_comes_back(dtype):
    words = _words(dtype)
    assert np.array_equal(join_planes(split_planes(words, dtype), dtype), words)


@pytest.mark.parametrize(("name", "one"), [("BF16", 0x3F80), ("F32", 0x3F800000)])
def test_plane_0_is_the_exponent(name, one):
    words = np.array([one, one | 1 << (DTYPES[name].bits - 1)], word_dtype(DTYPES[name]))
    planes = split_planes(words, DTYPES[name])
    assert planes[0].tolist() == [127, 127]
    assert planes[-1].tolist() == [0, 1]


def test_signalling_nans_and_signed_zeros_are_bits():
    words = np.array([0x7F81, 0xFF81, 0x7FC0, 0x8000, 0x0001], np.uint16)
    assert (
        join_planes(split_planes(words, DTYPES["BF16"]), DTYPES["BF16"]).tolist() == words.tolist()
    )


def test_no_elements():
    for dtype in PLANED:
        assert join_planes(split_planes(np.empty(0, word_dtype(dtype)), dtype), dtype).size == 0


@pytest.mark.parametrize("value", [2, 3, 128, 255])
def test_a_boolean_is_0_or_1(value):
    with pytest.raises(DecodeError, match="neither 0 nor 1"):
        join_planes([np.array([0, 1, value], np.uint8)], DTYPES["BOOL"])


def test_types_of_the_table_agree_with_numpy():
    kinds = {
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "I16": np.int16,
        "BOOL": np.bool_,
        "U64": np.uint64,
    }
    for name, kind in kinds.items():
        assert DTYPES[name].itemsize == np.dtype(kind).itemsize
        assert DTYPES[name].is_float == (np.dtype(kind).kind == "f")
