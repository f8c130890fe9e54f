"""Scales and groups of columns, and codes in two planes, against exact arithmetic (SPEC.md 7.3)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codecllm.formats.errors import DecodeError
from codecllm.formats.schemes.columns import inverse, make_columns, order_of
from codecllm.formats.schemes.int8 import (
    MAX_CODE,
    MAX_SCALE,
    MAX_WIDE_CODE,
    MAX_WIDE_STEP,
    MIN_SCALE,
    MIN_WIDE_CODE,
    check_codes,
    check_steps,
    dequantize,
    join_codes,
    quantize,
    split_codes,
    step_sizes,
)
from tests.unit.formats.exact import fl32

EVERY_CODE = np.arange(MIN_WIDE_CODE, MAX_WIDE_CODE + 1).astype(np.int16)


def _f32(*values):
    return np.array(values, np.float32)


@pytest.mark.parametrize("low_bits", range(1, 9))
def test_every_wide_code_has_one_pair_of_planes(low_bits):
    half = 1 << (low_bits - 1)
    codes = np.arange(-half - (127 << low_bits), half + (127 << low_bits)).astype(
        np.int16
    )  # all that have a high part
    low, high = split_codes(codes, low_bits)
    assert np.array_equal(join_codes(low, high, low_bits), codes)
    assert np.array_equal(low.astype(int) + 2**low_bits * high.astype(int), codes)
    assert (low.min(), low.max()) == (-half, half - 1)
    assert (high.min(), high.max()) == (-127, 127)
    check_codes(high)
    if low_bits == 8:
        assert np.array_equal(codes, EVERY_CODE)
        assert (high[np.abs(EVERY_CODE.astype(int)) <= MAX_CODE] == 0).all()


def test_no_code_is_beyond_two_planes():
    low, high = np.array([-128, 127], np.int8), np.array([-127, 127], np.int8)
    assert join_codes(low, high, 8).tolist() == [MIN_WIDE_CODE, MAX_WIDE_CODE]


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12))
def test_steps_and_weights_are_rounded_once_each(seed, rows, cols):
    rng = np.random.default_rng(seed)
    row = (2.0 ** rng.uniform(-40, 40, rows)).astype(np.float32)
    col = (2.0 ** rng.uniform(-40, 40, cols)).astype(np.float32)
    codes = rng.integers(MIN_WIDE_CODE, MAX_WIDE_CODE + 1, (rows, cols)).astype(np.int16)
    steps = step_sizes(row, col)
    weights = dequantize(codes, steps)
    for r in range(rows):
        for c in range(cols):
            step = fl32(Fraction(float(row[r])) * Fraction(float(col[c])))
            assert Fraction(float(steps[r, c])) == step
            assert Fraction(float(weights[r, c])) == fl32(int(codes[r, c]) * step)


def test_without_columns_a_step_is_the_scale_of_its_row():
    assert np.array_equal(step_sizes(_f32(1, 2), None), _f32(1, 2)[:, None])


@pytest.mark.parametrize("wide", [False, True])
def test_codes_are_nearest_and_never_leave_their_range(wide):
    weights, steps = _f32(0.49, 0.5, 1.5, -2.5, 126.6, 127.6, 1e9, -3e38), np.float32(1)
    end = MAX_WIDE_CODE if wide else MAX_CODE
    expected = [0, 0, 2, -2, 127, 128 if wide else 127, end, MIN_WIDE_CODE if wide else -end]
    codes = quantize(weights, steps, wide)
    assert codes.tolist() == expected
    assert codes.dtype == (np.int16 if wide else np.int8)


LIMITS = {
    "smallest": (_f32(1, MIN_SCALE), _f32(1), False, True),
    "subnormal row": (_f32(1, MIN_SCALE / 2), None, False, False),
    "zero": (_f32(0), None, False, False),
    "negative": (_f32(-1), None, False, False),
    "infinite": (_f32(np.inf), None, False, False),
    "not a number": (_f32(1, np.nan), None, False, False),
    "column not a number": (_f32(1), _f32(1, np.nan), False, False),
    "column of zero": (_f32(1), _f32(0), False, False),
    "subnormal step": (_f32(1, 2.0**-64), _f32(2.0**-63), False, False),
    "smallest step": (_f32(1, 2.0**-64), _f32(2.0**-62, 1), False, True),
    "largest": (_f32(MAX_SCALE), None, False, True),
    "too large": (np.nextafter(_f32(MAX_SCALE), np.inf, dtype=np.float32), None, False, False),
    "largest step": (_f32(MAX_SCALE / 2, 1), _f32(2, 1), False, True),
    "step too large": (_f32(MAX_SCALE / 2, 1), _f32(1, 4), False, False),
    "infinite step": (_f32(2.0**100), _f32(2.0**100), False, False),
    "wide and largest": (_f32(2.0**111), _f32(2), True, True),
    "wide and too large": (_f32(2.0**111), _f32(2.01), True, False),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_scales_and_steps(name):
    row, col, wide, fine = LIMITS[name]
    if fine:
        check_steps(row, col, wide)
        largest = step_sizes(row, col).max()
        assert np.isfinite(np.float32(MIN_WIDE_CODE if wide else MAX_CODE) * largest)
    else:
        with pytest.raises(DecodeError):
            check_steps(row, col, wide)
    assert MAX_WIDE_STEP == 2.0**112


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_any_groups_make_an_order_and_its_inverse(groups):
    held = np.array(groups, np.uint8)
    order = order_of(held)
    assert order.tolist() == sorted(range(len(groups)), key=lambda column: (groups[column], column))
    assert np.array_equal(order[inverse(order)], np.arange(len(groups)))
    source = np.arange(len(groups)) * 10
    assert np.array_equal(source[order][inverse(order)], source)


def test_columns_without_groups_stand_as_in_the_source():
    columns = make_columns(_f32(1, 2), None)
    assert (columns.order, columns.places) == (None, None)
    columns = make_columns(_f32(1, 2), np.array([9, 3], np.uint8))
    assert (columns.order.dtype, columns.order.tolist(), columns.places.tolist()) == (
        np.int32,
        [1, 0],
        [1, 0],
    )
