"""Checksums are equal for every way to feed the bytes; a mismatch names its place."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.formats.checksums import check_xxh3, xxh3, xxh3_each, xxh3_here, xxh3_hex
from codecllm.formats.errors import ChecksumError


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 131_072, 300_001])
def test_sums_are_the_same_however_they_are_taken(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    expected = xxh3(data)
    assert xxh3_here(memoryview(data)) == expected
    assert xxh3_each([data, memoryview(data)]).tolist() == [expected, expected]
    assert xxh3_hex(data) == f"{expected:016x}"


def test_known_sum():
    assert xxh3_hex(b"") == "2d06800538d394c2"


@pytest.mark.parametrize(
    ("tensor", "words"), [(None, "header differ"), ("w", "stored bytes differ")]
)
def test_what_differs_is_named(tensor, words):
    check_xxh3(b"", "2d06800538d394c2", "f", tensor, 3)
    with pytest.raises(ChecksumError, match=words) as caught:
        check_xxh3(b"x", "2d06800538d394c2", "f", tensor, 3)
    assert (caught.value.file, caught.value.tensor, caught.value.byte, caught.value.expected) == (
        "f",
        tensor,
        3,
        "2d06800538d394c2",
    )
