"""How codes of 16 bits are cut into two planes."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.converter.encode.wide_codes import choose_low_bits, halves
from codecllm.formats.codecs.entropy import counted_entropy_bits
from codecllm.formats.codecs.zstd import ZstdCodec
from codecllm.formats.schemes.int8 import MAX_WIDE_CODE, MIN_WIDE_CODE, check_codes, join_codes


def gaussian(sigma, rows=256, cols=256, seed=0):
    return np.rint(sigma * np.random.default_rng(seed).standard_normal((rows, cols))).astype(
        np.int16
    )


def entropy(codes):
    return counted_entropy_bits(np.unique(codes, return_counts=True)[1]) / codes.size


def packed_bits(tile, low_bits):
    return (
        8 * sum(len(ZstdCodec().encode_sparse(half)) for half in halves(tile, low_bits)) / tile.size
    )


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("sigma", [3, 30, 60, 200, 2000, 8000])
def test_whatever_is_chosen_every_high_part_fits(codec, sigma):
    codes = np.clip(gaussian(sigma), MIN_WIDE_CODE, MAX_WIDE_CODE)
    (low_bits,) = choose_low_bits([[codes]], codec)
    assert 3 <= low_bits <= 8
    low, high = (half.view(np.int8).reshape(codes.shape) for half in halves(codes, low_bits))
    check_codes(high)
    assert np.array_equal(join_codes(low, high, low_bits), codes)


@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_the_ends_of_the_range_and_narrow_codes_keep_a_whole_byte(codec):
    ends = np.array([[MIN_WIDE_CODE, MAX_WIDE_CODE]], np.int16)
    narrow = np.array([[-127, 127]], np.int16)
    assert choose_low_bits([[ends, narrow]], codec) == [8, 8]


@pytest.mark.parametrize("sigma", [30, 60, 100])
def test_wide_codes_are_stored_near_their_entropy(sigma):
    codes = gaussian(sigma)
    (low_bits,) = choose_low_bits([[codes]], "zstd")
    assert packed_bits(codes, low_bits) < entropy(codes) + 0.08
    assert packed_bits(codes, low_bits) <= packed_bits(codes, 8)


def test_few_outliers_leave_a_high_plane_of_zeros():
    codes = gaussian(10)
    codes[::40, 7] = 3000
    (low_bits,) = choose_low_bits([[codes]], "zstd")
    assert low_bits >= 7
    assert packed_bits(codes, low_bits) < packed_bits(codes, 5)


def test_tiles_of_their_own_choose_on_their_own_and_those_that_share_tables_together():
    bands = [[gaussian(60), gaussian(5)], [gaussian(2000), gaussian(5)]]
    apart, together = choose_low_bits(bands, "zstd"), choose_low_bits(bands, "rans")
    assert apart[0] < apart[2]
    assert (apart[1], apart[3]) == (8, 8)
    assert together[0] == together[2]
    assert (together[1], together[3]) == (8, 8)


def test_no_tiles_are_no_choice():
    assert choose_low_bits([], "zstd") == choose_low_bits([], "rans") == []
