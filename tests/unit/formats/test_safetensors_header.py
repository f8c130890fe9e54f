"""Shard headers: exact bytes that the official library reads, and an error for each flaw."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save

from codecllm.formats import limits
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import (
    CodecLLMError,
    LayoutError,
    LimitError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
)
from codecllm.formats.files import SafeFile
from codecllm.formats.shards import safetensors_header
from codecllm.formats.shards.safetensors_header import (
    TensorEntry,
    check_name,
    check_shape,
    pack_header,
    parse_header,
    read_header,
)


def _parse(document, data_bytes=8, **options):
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    raw = len(text).to_bytes(8, "little") + text
    return parse_header(raw, file_bytes=len(raw) + data_bytes, file="f", **options)


def _entry(shape=(2,), dtype="F32", offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_exact_bytes():
    head = pack_header([TensorEntry("a", DTYPES["F32"], (2,), 0, 8)], {"format": "pt"})
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert head == b"\x58\0\0\0\0\0\0\0" + text + b" " * 3


def test_places_count_from_the_start_of_the_file():
    header = _parse(
        {
            "b": _entry((1,), offsets=(4, 8)),
            "a": _entry((1,), offsets=(0, 4)),
            "__metadata__": {"k": "v"},
        }
    )
    assert list(header.tensors) == ["a", "b"]
    base = len(header.raw)
    assert [(entry.start, entry.end, entry.bytes) for entry in header.tensors.values()] == [
        (base, base + 4, 4),
        (base + 4, base + 8, 4),
    ]
    assert header.metadata == {"k": "v"}


def test_the_official_library_reads_what_is_written(tmp_path):
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "é/ü": np.arange(3, dtype=np.int64),
        "s": np.array(7, np.uint8),
    }
    entries, position = [], 0
    for name, array in values.items():
        dtype = {"f": "F32", "i": "I64", "u": "U8"}[array.dtype.kind]
        entries.append(
            TensorEntry(name, DTYPES[dtype], array.shape, position, position + array.nbytes)
        )
        position += array.nbytes
    data = pack_header(entries, {"format": "pt"}, header_bytes=1000) + b"".join(
        a.tobytes() for a in values.values()
    )
    (tmp_path / "f.safetensors").write_bytes(data)
    for name, array in load(data).items():
        assert np.array_equal(array, values[name])
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_official_library_writes_is_read(tmp_path):
    arrays = {
        "w": np.zeros((3, 4), np.float16),
        "e": np.zeros((0, 7), np.float32),
        "s": np.array(1.0),
    }
    (tmp_path / "f").write_bytes(save(arrays))
    with SafeFile(tmp_path, "f") as file:
        header = read_header(file)
    assert {name: entry.shape for name, entry in header.tensors.items()} == {
        name: a.shape for name, a in arrays.items()
    }


def test_headers_without_tensors_and_empty_tensors():
    assert _parse({}, 0).tensors == {}
    header = _parse(
        {"a": _entry((0, 7), offsets=(0, 0)), "b": _entry((7, 0), offsets=(0, 0)), "c": _entry()}
    )
    assert [entry.bytes for entry in header.tensors.values()] == [0, 0, 8]


def test_padding_is_spaces_at_the_end_only():
    assert _parse(b'{"a": ' + json.dumps(_entry()).encode() + b"}   ").tensors
    for text in (b" {}", b"\n{}", b"{}\0", b"{} ,"):
        with pytest.raises(SchemaError):
            _parse(text, 0)


FLAWS = {
    "empty text": (b"", SchemaError, "begin with"),
    "list": (b"[]", SchemaError, "begin with"),
    "metadata twice": (b'{"__metadata__": {}, "__metadata__": {}}', SchemaError, "twice"),
    "name twice": (
        b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}',
        SchemaError,
        "twice",
    ),
    "metadata of lists": ({"__metadata__": {"a": []}}, SchemaError, "__metadata__"),
    "entry is null": ({"a": None}, SchemaError, "dtype, shape"),
    "entry is empty": ({"a": {}}, SchemaError, "dtype, shape"),
    "more keys": ({"a": _entry(strides=[1])}, SchemaError, "dtype, shape"),
    "dtype in lower case": ({"a": _entry(dtype="f32")}, SchemaError, "unknown dtype"),
    "dtype is a list": ({"a": _entry(dtype=["F32"])}, SchemaError, "unknown dtype"),
    "float dimension": ({"a": _entry((2.0,))}, SchemaError, "non-negative"),
    "true for a dimension": ({"a": _entry((True,), offsets=(0, 4))}, SchemaError, "non-negative"),
    "negative dimensions": ({"a": _entry((-1, -2))}, SchemaError, "non-negative"),
    "nine dimensions": ({"a": _entry((1,) * 8 + (2,))}, LimitError, "limits"),
    "dimension of 2^48 + 1": ({"a": _entry((2**48 + 1, 0))}, LimitError, "limits"),
    "product wraps to 0": ({"a": _entry((2**33, 2**31), offsets=(0, 0))}, LimitError, "too large"),
    "product beside a 0": (
        {"a": _entry((2**30, 0, 2**30), offsets=(0, 0))},
        LimitError,
        "too large",
    ),
    "one offset": ({"a": _entry(offsets=(0,))}, SchemaError, "pair"),
    "offset is true": ({"a": _entry(offsets=(False, 8))}, SchemaError, "pair"),
    "negative offset": ({"a": _entry(offsets=(-8, 0))}, LayoutError, "disagree"),
    "backwards": ({"a": _entry(offsets=(8, 0))}, LayoutError, "disagree"),
    "size of another dtype": ({"a": _entry(dtype="F64")}, LayoutError, "disagree"),
    "half a byte": ({"a": _entry((3,), "F4", (0, 1))}, LayoutError, "1.5 bytes"),
    "overlap": ({"a": _entry(), "b": _entry((1,), offsets=(4, 8))}, LayoutError, "overlaps"),
    "the same bytes twice": ({"a": _entry(), "b": _entry()}, LayoutError, "overlaps"),
    "hole at the start": ({"a": _entry((1,), offsets=(4, 8))}, LayoutError, "hole"),
    "hole in the middle": (
        {"a": _entry((0,), offsets=(0, 0)), "b": _entry((1,), offsets=(4, 8))},
        LayoutError,
        "hole",
    ),
    "data beyond the file": (
        {"a": _entry((3,), offsets=(0, 12))},
        TruncatedError,
        "inside its data",
    ),
    "bytes that follow": ({"a": _entry((1,), offsets=(0, 4))}, LayoutError, "follow"),
    "file without tensors but data": ({}, LayoutError, "follow"),
}


def _outcome(text):
    try:
        header = _parse(text, 24)
    except CodecLLMError as exc:
        return type(exc), None  # of two faults either may be met first
    return header.tensors, header.metadata


SEPARATORS = [(",", ":"), (", ", ": "), (",\n", ":")]


@pytest.mark.parametrize("separators", SEPARATORS)
def test_entries_taken_at_once_are_those_that_are_decoded(separators, monkeypatch):
    documents = [
        {"a": _entry((2,)), "b.weight": _entry((), "U8", (8, 9)), "c": _entry((0, 3), "I8", (9, 9))}
        | {"d": _entry((3, 5), "I8", (9, 24))},
        {"__metadata__": {"format": "pt"}, "ä": _entry((2, 3), "F32", (0, 24))},
        {"a\\b": _entry((24,), "U8", (0, 24))},
        {"__metadata__": _entry((2,)), "a": _entry((24,), "U8", (0, 24))},
        {"a": _entry((2**53,), "U8", (0, 10**15))},
        {"a": _entry((24,), "U8", (0, 24)), "x" * 300: _entry((0,), "U8", (24, 24))},
    ]
    texts = [json.dumps(document, separators=separators).encode() for document in documents]
    rng = random.Random(0)
    for text in texts[:2]:
        for _ in range(1500):
            place = rng.randrange(len(text))
            other = rng.choice(
                [b"", bytes([rng.randrange(256)]), rng.choice([*b'0",:{}[] -\\']).to_bytes()]
            )
            texts.append(text[:place] + other + text[place + 1 :])
    at_once = [_outcome(text) for text in texts]
    assert sum(type(outcome[0]) is dict for outcome in at_once) > 100
    monkeypatch.setattr(safetensors_header, "_ENTRY", None)
    for text, outcome in zip(texts, at_once, strict=True):
        assert _outcome(text) == outcome, text


@pytest.mark.parametrize("name", FLAWS)
def test_flaw_has_its_error(name):
    document, expected, words = FLAWS[name]
    with pytest.raises(expected, match=words) as caught:
        _parse(document)
    assert type(caught.value) is expected
    assert caught.value.file == "f"


@pytest.mark.parametrize("name", ["", "__metadata__", "a\nb", "a\0", "\x7f", "\x1b[31m"], ids=ascii)
def test_names_that_are_refused(name):
    with pytest.raises(SchemaError, match="tensor name"):
        check_name(name, "f")


def test_name_limit_counts_bytes():
    check_name("é" * 256, "f")
    assert limits.NAME_BYTES == 512
    with pytest.raises(LimitError, match="too long"):
        check_name("é" * 256 + "a", "f")
    for name in ("../../x", "a/b", " ", "w\u200b", "😀"):
        check_name(name, "f")


def test_shape_limits_are_the_last_that_pass():
    assert check_shape([], "f", "t") == ()
    assert check_shape([1] * 8, "f", "t") == (1,) * 8
    assert check_shape([2**24, 2**24], "f", "t") == (2**24, 2**24)
    with pytest.raises(LimitError):
        check_shape([2**24, 2**24 + 1], "f", "t")


@pytest.mark.parametrize(
    ("data", "expected", "words"),
    [
        (b"", NotAContainerError, "too short"),
        (b"1234567", NotAContainerError, "too short"),
        (b"\x02\0\0\0\0\0\0\0[]", SchemaError, "begin with"),
        (b"PK\x03\x04\xff\xff\xff\xff" + bytes(60), NotAContainerError, "zip"),
        (b"version https://git-lfs.github.com/spec/v1\noid", NotAContainerError, "Git LFS"),
        (b"<!DOCTYPE html>", NotAContainerError, "HTML"),
        (b"\xff" * 20, LimitError, "too long"),
        ((25_000_001).to_bytes(8, "little") + b"{}", LimitError, "too long"),
        ((25_000_000).to_bytes(8, "little") + b"{}", TruncatedError, "inside its header"),
        ((3).to_bytes(8, "little") + b"{}", TruncatedError, "inside its header"),
    ],
)
def test_files_that_are_no_shards(tmp_path, data, expected, words):
    (tmp_path / "f").write_bytes(data)
    with SafeFile(tmp_path, "f") as file, pytest.raises(expected, match=words):
        read_header(file)


def test_a_header_that_does_not_fit_is_not_written():
    entry = TensorEntry("a" * 100, DTYPES["U8"], (1,), 0, 1)
    with pytest.raises(LimitError, match="does not fit"):
        pack_header([entry], {}, header_bytes=100)
    assert len(pack_header([entry], {}, header_bytes=200)) == 208


def test_plain_entries_are_judged_as_others_are(monkeypatch):
    """By one pattern, and value by value: entries of many types, shapes and offsets."""
    rng = random.Random(3)
    documents = []
    for _ in range(600):
        dtype = rng.choice([*DTYPES, "F4", "BF17", "Z9"])
        shape = [
            rng.choice([0, 1, 2, 3, 1 << 47, 1 << 49]) for _ in range(rng.choice([0, 1, 2, 9]))
        ]
        bits = DTYPES[dtype].bits if dtype in DTYPES else 8
        size = math.prod(shape) * bits // 8 if rng.random() < 0.8 else 8
        offsets = (0, size if size < 10**15 else 8)
        documents.append(
            (json.dumps({"a": _entry(shape, dtype, offsets)}, separators=(",", ":")), size)
        )

    def verdicts():
        for text, size in documents:
            try:
                yield _parse(text.encode(), data_bytes=size).tensors
            except CodecLLMError as exc:
                yield str(exc)

    found = list(verdicts())
    monkeypatch.setattr(safetensors_header, "_plain_entry", lambda *_: None)
    assert found == list(verdicts())
    assert 100 < sum(isinstance(verdict, dict) for verdict in found) < 500
