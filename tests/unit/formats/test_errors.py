"""Errors are one line with every known fact, and each class has its exit code."""

from __future__ import annotations

import os

import pytest

from codecllm.formats import errors
from codecllm.formats.checksums import sha256_hex, sha256_of_descriptor, xxh3, xxh3_hex
from codecllm.formats.errors import ChecksumError, CodecLLMError, FormatError


def test_one_line_with_every_fact():
    error = ChecksumError(
        "xxh3", file="s", tensor="t", chunk=7, byte=1048576, got="1a", expected="2b"
    )
    assert str(error) == "s: tensor 't' chunk 7 at byte 1048576: xxh3, got 1a, expected 2b"
    assert (error.file, error.tensor, error.chunk, error.byte, error.got, error.expected) == (
        "s",
        "t",
        7,
        1048576,
        "1a",
        "2b",
    )


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({}, "m"),
        ({"file": "s"}, "s: m"),
        ({"tensor": "t"}, "tensor 't': m"),
        ({"file": "s", "byte": 0}, "s: at byte 0: m"),
        ({"tensor": "t", "chunk": 0}, "tensor 't' chunk 0: m"),
        ({"tensor": ""}, "tensor '': m"),
        ({"got": 0, "expected": 1}, "m, got 0, expected 1"),
        ({"tensor": "a\nb"}, "tensor 'a\\nb': m"),
    ],
)
def test_absent_facts_leave_no_gap(facts, line):
    assert str(FormatError("m", **facts)) == line


def test_located_fills_in_and_never_overwrites():
    error = ChecksumError("m", tensor="mine", chunk=0)
    assert error.located(tensor="other", file="s", chunk=5) is error
    assert (error.file, error.tensor, error.chunk) == ("s", "mine", 0)


def test_exit_codes_of_the_whole_tree():
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, CodecLLMError)
    ]
    assert len(classes) > 15
    codes = {cls.__name__: cls.exit_code for cls in classes if cls.exit_code != 1}
    assert codes == {
        "UnsupportedVersionError": 3,
        "UnsafePathError": 5,
        "UnsafeSourceError": 5,
        "OutputExistsError": 2,
        "UsageError": 2,
        "HubError": 4,
        "UnsupportedEnvironmentError": 3,
    }
    assert all(cls.__doc__ for cls in classes)


def test_checksums_are_the_published_ones():
    """Test values of the algorithms' own publications."""
    assert xxh3_hex(b"") == "2d06800538d394c2"
    assert xxh3(b"") == 0x2D06800538D394C2
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert xxh3_hex(memoryview(b"abc")) == xxh3_hex(bytearray(b"abc"))


def test_a_file_is_digested_from_its_start(tmp_path):
    data = os.urandom((4 << 20) + 5)
    (tmp_path / "f").write_bytes(data)
    steps = []
    with open(tmp_path / "f", "rb") as file:
        file.seek(77)
        assert sha256_of_descriptor(file.fileno(), steps.append) == (sha256_hex(data), len(data))
        assert (file.tell(), steps) == (77, [4 << 20, 5])
    with open(os.devnull, "rb") as file:
        assert sha256_of_descriptor(file.fileno()) == (sha256_hex(b""), 0)
