"""Malformed manifests: each case changes one thing and has exactly one right answer."""

from __future__ import annotations

import json

import pytest

from codecllm.formats.checksums import sha256_hex
from codecllm.formats.errors import (
    ChecksumError,
    CodecLLMError,
    LayoutError,
    LimitError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
    UnsafePathError,
    UnsupportedVersionError,
)
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from tests import tampering
from tests.malformed.builders import SHARD, read_everything, read_tensors

L, Q, C, N = 0, 1, 2, 3
"""Positions in the manifest's tensors: lossless, int8 by rows, int8 by columns, plain."""


def _text(change):
    """A change of the manifest's bytes that leaves the seal as it was."""
    return lambda folder: (folder / MANIFEST_NAME).write_bytes(
        change((folder / MANIFEST_NAME).read_bytes())
    )


def _sealed(old, new):
    """A replacement in the manifest's text, sealed again."""

    def damage(folder):
        data = (folder / MANIFEST_NAME).read_bytes()
        text = data[: data.rindex(b'"manifest_sha256"')]
        assert old in text
        text = text.replace(old, new, 1)
        (folder / MANIFEST_NAME).write_bytes(
            text + f'"manifest_sha256":"{sha256_hex(text)}"}}\n'.encode()
        )

    return damage


def _edit(change):
    """An edit of the manifest's values, sealed again."""
    return lambda folder: tampering.reseal(folder, change)


def _set(*path):
    """Sets a value: `_set("tensors", 0, "shard", 9)`."""
    *keys, last, value = path

    def change(document):
        for key in keys:
            document = document[key]
        document[last] = value

    return _edit(change)


def _drop(*path):
    *keys, last = path

    def change(document):
        for key in keys:
            document = document[key]
        del document[last]

    return _edit(change)


def _alias(**fields):
    record = {
        "name": "tied",
        "dtype": "BF16",
        "shape": [40, 64],
        "scheme": "alias",
        "alias_of": "l",
    }
    return _edit(lambda document: document["tensors"].append({**record, **fields}))


def _two_aliases(first, second):
    base = {"dtype": "BF16", "shape": [40, 64], "scheme": "alias"}
    records = [{**base, "name": "a", "alias_of": first}, {**base, "name": "b", "alias_of": second}]
    return _edit(lambda document: document["tensors"].extend(records))


def _deep(folder):
    value = "x"
    for _ in range(20):
        value = [value]
    tampering.reseal(folder, lambda document: document.update(x_deep=value))


def _side_tensor_twice(document):
    checksum = document["tensors"][Q]["xxh3"]["shape"]
    record = {
        "name": "q_shape",
        "dtype": "I64",
        "shape": [2],
        "scheme": "raw",
        "shard": 0,
        "digest": "0" * 64,
        "xxh3": checksum,
    }
    document["tensors"].append(record)


def _header_flip(folder):
    """Breaks the JSON of the shard's header; its checksum is compared before it is parsed."""
    tampering.flip_bit(folder / SHARD, 9)


def _many_files(document):
    document["files"] = [{"name": f"f{i}", "bytes": 0, "sha256": "0" * 64} for i in range(4097)]


FLAWS = {
    "empty": (_text(lambda data: b""), NotAContainerError, "not JSON"),
    "one byte": (_text(lambda data: b"{"), TruncatedError, "seal"),
    "cut in the middle": (_text(lambda data: data[:900]), TruncatedError, "seal"),
    "cut by one byte": (_text(lambda data: data[:-1]), TruncatedError, "seal"),
    "trailing byte": (_text(lambda data: data + b"\n"), TruncatedError, "seal"),
    "html page": (_text(lambda data: b"<!DOCTYPE html><html>"), NotAContainerError, "HTML"),
    "lfs pointer": (
        _text(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
        NotAContainerError,
        "Git LFS",
    ),
    "zip": (_text(lambda data: b"PK\x03\x04" + data), NotAContainerError, "zip"),
    "byte order mark": (_text(lambda data: b"\xef\xbb\xbf" + data), NotAContainerError, "not JSON"),
    "utf-16": (_text(lambda data: data.decode().encode("utf-16")), NotAContainerError, "not JSON"),
    "an array": (_text(lambda data: b"[" + data + b"]"), NotAContainerError, "not JSON"),
    "one byte changed": (
        _text(lambda data: data.replace(b"1.1", b"1.2", 1)),
        ChecksumError,
        "seal",
    ),
    "crlf": (_text(lambda data: data.replace(b"\n", b"\r\n")), TruncatedError, "seal"),
    "seal of another": (
        _text(lambda data: data[:-67] + b"0" * 64 + data[-3:]),
        ChecksumError,
        "seal",
    ),
    "not utf-8": (_sealed(b'"digest"', b'"dig\xff"'), SchemaError, "UTF-8"),
    "not json": (_sealed(b'"options":', b'"options";'), SchemaError, "not JSON"),
    "duplicate key at the top": (
        _sealed(b'"source":', b'"options":{},"source":'),
        SchemaError,
        "stands twice",
    ),
    "duplicate key in a record": (
        _sealed(b'"shard":0', b'"shard":0,"shard":0'),
        SchemaError,
        "stands twice",
    ),
    "duplicate key in a side": (
        _sealed(b'"codec":"zstd"', b'"codec":"zstd","codec":"raw"'),
        SchemaError,
        "stands twice",
    ),
    "nan": (_sealed(b'"worst_error":0', b'"worst_error":NaN,"x":0'), SchemaError, "NaN"),
    "infinity": (
        _sealed(b'"worst_error":0', b'"worst_error":-Infinity,"x":0'),
        SchemaError,
        "Infinity",
    ),
    "1e400": (_sealed(b'"worst_error":0', b'"worst_error":1e400,"x":0'), SchemaError, "not finite"),
    "huge integer": (_sealed(b'"shard":0', b'"shard":9007199254740993'), LimitError, "too large"),
    "integer of 5000 digits": (
        _sealed(b'"shard":0', b'"shard":' + b"1" * 5000),
        LimitError,
        "too large",
    ),
    "deep nesting": (_deep, LimitError, "too deeply"),
    "very deep nesting": (
        _sealed(b'"options":', b'"x_a":' + b"[" * 9000 + b"]" * 9000 + b',"options":'),
        LimitError,
        "deeply",
    ),
    "lone surrogate": (_sealed(b'"name":"q"', b'"name":"\\ud800"'), SchemaError, "surrogate"),
    "format missing": (_drop("format"), NotAContainerError, "format"),
    "format of another": (_set("format", "gguf"), NotAContainerError, "format"),
    "major 2": (_set("format_version", "2.0"), UnsupportedVersionError, "2.0"),
    "major 0": (_set("format_version", "0.9"), UnsupportedVersionError, "0.9"),
    "version as number": (_set("format_version", 1.0), UnsupportedVersionError, "format version"),
    "version without minor": (_set("format_version", "1"), SchemaError, "format_version"),
    "unknown required feature": (_set("required_features", ["x"]), UnsupportedVersionError, "'x'"),
    "required feature that is a list": (
        _set("required_features", [[]]),
        SchemaError,
        "required_features",
    ),
    "required feature that is an object": (
        _set("required_features", [{}]),
        SchemaError,
        "required_features",
    ),
    "required features in a string": (
        _set("required_features", "x"),
        SchemaError,
        "required_features",
    ),
    "version in other digits": (_set("format_version", "1.\u0663"), SchemaError, "format_version"),
    "minor with a leading zero": (_set("format_version", "1.01"), SchemaError, "format_version"),
    "major with a leading zero": (_set("format_version", "01.1"), UnsupportedVersionError, "01.1"),
    "version with a line feed": (_set("format_version", "1.0\n"), SchemaError, "format_version"),
    "features missing": (_drop("required_features"), SchemaError, "required_features"),
    "unknown scheme": (_set("tensors", Q, "scheme", "int3"), UnsupportedVersionError, "int3"),
    "unknown codec": (
        _set("tensors", Q, "planes", 0, "codec", "rans9"),
        UnsupportedVersionError,
        "rans9",
    ),
    "unknown key at the top": (_set("extra", 1), SchemaError, "extra"),
    "unknown key in a record": (_set("tensors", Q, "extra", 1), SchemaError, "extra"),
    "key missing": (_drop("shards"), SchemaError, "shards"),
    "digest missing": (_drop("tensors", Q, "digest"), SchemaError, "digest"),
    "true for an integer": (_set("tensors", Q, "shard", True), SchemaError, "shard"),
    "float for an integer": (_set("tensors", Q, "shard", 0.0), SchemaError, "shard"),
    "string for an integer": (_set("shards", 0, "bytes", "12"), SchemaError, "bytes"),
    "null for a string": (_set("tensors", Q, "name", None), SchemaError, "name"),
    "null for an optional key": (_set("tensors", Q, "rounding", None), SchemaError, "rounding"),
    "null for an optional object": (_set("calibration", None), SchemaError, "calibration"),
    "null for an optional option": (_set("options", "bits", None), SchemaError, "options.bits"),
    "null for a checksum": (_set("tensors", L, "xxh3", "tables", None), SchemaError, "tables"),
    "negative size": (_set("shards", 0, "bytes", -1), SchemaError, "bytes"),
    "digest too short": (_set("tensors", Q, "digest", "ab"), SchemaError, "digest"),
    "digest in capitals": (_set("tensors", Q, "digest", "AB" * 32), SchemaError, "digest"),
    "xxh3 too long": (_set("shards", 0, "header_xxh3", "0" * 17), SchemaError, "header_xxh3"),
    "name twice": (_set("tensors", Q, "name", "l"), SchemaError, "stands twice"),
    "names differ by normal form": (
        _edit(
            lambda d: (d["tensors"][L].update(name="e\u0301"), d["tensors"][Q].update(name="\xe9"))
        ),
        SchemaError,
        "stands twice",
    ),
    "empty name": (_set("tensors", N, "name", ""), SchemaError, "name"),
    "reserved name": (_set("tensors", N, "name", "__metadata__"), SchemaError, "name"),
    "name with nul": (_set("tensors", N, "name", "a\0b"), SchemaError, "name"),
    "name of 600 bytes": (_set("tensors", N, "name", "n" * 600), LimitError, "name"),
    "unknown dtype": (_set("tensors", N, "dtype", "F128"), SchemaError, "dtype"),
    "rank 9": (_set("tensors", N, "shape", [1] * 9), LimitError, "shape"),
    "negative dimension": (_set("tensors", N, "shape", [-9]), SchemaError, "shape"),
    "dimension beyond the limit": (_set("tensors", N, "shape", [2**50]), LimitError, "shape"),
    "elements overflow": (_set("tensors", N, "shape", [2**40, 2**40]), LimitError, "too large"),
    "huge dimension beside 0": (
        _set("tensors", N, "shape", [2**47, 0, 2**47]),
        LimitError,
        "too large",
    ),
    "shard that is not there": (_set("tensors", N, "shard", 1), SchemaError, "no such shard"),
    "lossless of rank 1": (_set("tensors", L, "shape", [2560]), SchemaError, "does not fit"),
    "int8 of integers": (_set("tensors", Q, "dtype", "I64"), SchemaError, "does not fit"),
    "int8 of doubles": (_set("tensors", Q, "dtype", "F64"), SchemaError, "does not fit"),
    "int8 with two planes": (
        _edit(lambda d: d["tensors"][Q]["planes"].append(d["tensors"][Q]["planes"][0])),
        SchemaError,
        "'wide' is used",
    ),
    "int8 without elements": (_set("tensors", Q, "shape", [0, 80]), SchemaError, "does not fit"),
    "side tensor as a tensor of its own": (_edit(_side_tensor_twice), SchemaError, "side tensor"),
    "4097 side files": (_edit(_many_files), LimitError, "files"),
    "lossless with one plane": (
        _edit(lambda d: d["tensors"][L]["planes"].pop()),
        SchemaError,
        "does not fit",
    ),
    "no planes": (_set("tensors", Q, "planes", []), SchemaError, "planes"),
    "plane of another size": (
        _set("tensors", Q, "planes", 0, "raw_bytes", 7),
        SchemaError,
        "wrong size",
    ),
    "tile of 0 rows": (_set("tensors", Q, "tile", [0, 80]), SchemaError, "tile"),
    "tile of one number": (_set("tensors", Q, "tile", [24]), SchemaError, "tile"),
    "channel axis 8": (_set("tensors", Q, "channel_axis", 8), SchemaError, "channel_axis"),
    "channel axis beyond the rank": (_set("tensors", Q, "channel_axis", 5), SchemaError, "axis"),
    "column axis is not the last": (_set("tensors", C, "channel_axis", 0), SchemaError, "axis"),
    "channel kind": (_set("tensors", Q, "channel_kind", "diagonal"), SchemaError, "channel_kind"),
    "scale checksum missing": (_drop("tensors", Q, "xxh3", "scale"), SchemaError, "scales"),
    "scale checksum of a lossless": (
        _set("tensors", L, "xxh3", "scale", "0" * 16),
        SchemaError,
        "scales",
    ),
    "alias of itself": (_alias(alias_of="tied"), SchemaError, "alias"),
    "alias of nothing": (_alias(alias_of="nobody"), SchemaError, "alias"),
    "alias chain": (_two_aliases("l", "a"), SchemaError, "alias"),
    "alias cycle": (_two_aliases("b", "a"), SchemaError, "alias"),
    "alias of another shape": (_alias(shape=[64, 40]), SchemaError, "differ"),
    "alias of another dtype": (_alias(dtype="F16"), SchemaError, "differ"),
    "file outside": (_set("files", 0, "name", "../config.json"), UnsafePathError, "unsafe"),
    "absolute file": (_set("files", 0, "name", "/etc/passwd"), UnsafePathError, "unsafe"),
    "backslash": (_set("files", 0, "name", "a\\..\\b"), UnsafePathError, "unsafe"),
    "two folders deep": (_set("files", 0, "name", "a/b/c"), SchemaError, "feature 'paths'"),
    "hidden file": (_set("files", 0, "name", ".git/config"), UnsafePathError, "unsafe"),
    "trailing dot": (_set("files", 0, "name", "config."), UnsafePathError, "unsafe"),
    "nul in a file": (_set("files", 0, "name", "a\0"), UnsafePathError, "unsafe"),
    "full-width dots": (_set("files", 0, "name", "\uff0e\uff0e/x"), UnsafePathError, "unsafe"),
    "file name of 300 bytes": (_set("files", 0, "name", "f" * 300), UnsafePathError, "unsafe"),
    "file twice": (_edit(lambda d: d["files"].append(dict(d["files"][0]))), SchemaError, "twice"),
    "file twice by case": (
        _edit(lambda d: d["files"].append({**d["files"][0], "name": "CONFIG.json"})),
        SchemaError,
        "twice",
    ),
    "manifest lists itself": (_set("files", 0, "name", MANIFEST_NAME), SchemaError, "reserved"),
    "manifest lists itself by case": (
        _set("files", 0, "name", "CODECLLM.JSON"),
        SchemaError,
        "reserved",
    ),
    "readme is listed": (_set("files", 0, "name", "README.md"), SchemaError, "reserved"),
    "readme is listed by case": (_set("files", 0, "name", "readme.MD"), SchemaError, "reserved"),
    "file inside a file": (_set("files", 0, "name", "config.json/x"), TruncatedError, "missing"),
    "shard as a side file": (
        _edit(
            lambda d: d["files"].append(
                {**d["files"][0], "name": "model-00002-of-00002.safetensors"}
            )
        ),
        SchemaError,
        "side file",
    ),
    "shard of another name": (
        _set("shards", 0, "name", "weights.safetensors"),
        SchemaError,
        "wrong name",
    ),
    "shard outside": (_set("shards", 0, "name", "../model.safetensors"), UnsafePathError, "unsafe"),
    "two shards of one name": (
        _edit(lambda d: d["shards"].append(dict(d["shards"][0]))),
        SchemaError,
        "wrong name",
    ),
    "listed file that is not there": (
        _set("files", 0, "name", "vocab.txt"),
        TruncatedError,
        "missing",
    ),
    "file too short": (_set("files", 0, "bytes", 9999), TruncatedError, "too short"),
    "file too long": (_set("files", 0, "bytes", 1), LayoutError, "too long"),
    "file of another digest": (_set("files", 0, "sha256", "0" * 64), ChecksumError, "sha256"),
    "shard of another digest": (_set("shards", 0, "sha256", "0" * 64), ChecksumError, "sha256"),
    "commit is no commit": (_set("source", "commit", "main"), SchemaError, "commit"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_flaw_has_its_error(folder, name):
    damage, expected, words = FLAWS[name]
    damage(folder)
    with pytest.raises(CodecLLMError) as caught:
        read_everything(folder)
    assert type(caught.value) is expected, repr(caught.value)
    assert words in str(caught.value)
    assert caught.value.file is not None
    assert "\n" not in str(caught.value)


def _say_plain(document):
    kept = {
        key: document["tensors"][L][key] for key in ("name", "dtype", "shape", "shard", "digest")
    }
    document["tensors"][L] = {**kept, "scheme": "raw", "xxh3": "0" * 16}


SEEN_BY_TENSORS = {
    "row matrix said to be columns": (
        _set("tensors", Q, "channel_kind", "column"),
        SchemaError,
        "q",
    ),
    "another tile": (_set("tensors", Q, "tile", [12, 80]), LayoutError, "q"),
    "another shape of as many elements": (_set("tensors", L, "shape", [64, 40]), LayoutError, "l"),
    "stored bytes of another": (
        _set("tensors", Q, "planes", 0, "stored_bytes", 1),
        LayoutError,
        "q",
    ),
    "plain tensor of another dtype": (_set("tensors", N, "dtype", "I32"), LayoutError, "n"),
    "plain tensor of another shape": (_set("tensors", N, "shape", [3, 3]), LayoutError, "n"),
    "coded tensor said to be plain": (_edit(_say_plain), LayoutError, "l"),
    "tensor that the shard lacks": (_set("tensors", N, "name", "other"), LayoutError, "other"),
    "tensor left out": (_edit(lambda d: d["tensors"].pop()), LayoutError, "n"),
    "plain checksum": (_set("tensors", N, "xxh3", "0" * 16), ChecksumError, "n"),
    "chunk table checksum": (
        _set("tensors", L, "xxh3", "chunks", "0" * 16),
        ChecksumError,
        "l_chunks",
    ),
    "shape checksum": (_set("tensors", L, "xxh3", "shape", "0" * 16), ChecksumError, "l_shape"),
    "scale checksum": (_set("tensors", Q, "xxh3", "scale", "0" * 16), ChecksumError, "q_scale"),
    "header checksum": (_set("shards", 0, "header_xxh3", "0" * 16), ChecksumError, None),
    "header that is no JSON and differs": (_header_flip, ChecksumError, None),
    "codec of a plane that its chunks do not use": (
        _set("tensors", L, "planes", 1, "codec", "zstd"),
        LayoutError,
        "l",
    ),
    "codec of a plane that says raw": (
        _set("tensors", Q, "planes", 0, "codec", "raw"),
        LayoutError,
        "q",
    ),
}


@pytest.mark.parametrize("name", SEEN_BY_TENSORS)
def test_contradiction_between_manifest_and_shard(folder, name):
    damage, expected, tensor = SEEN_BY_TENSORS[name]
    damage(folder)
    with pytest.raises(expected) as caught:
        read_tensors(folder)
    assert caught.value.tensor == tensor
    assert caught.value.file == (MANIFEST_NAME if expected is SchemaError else SHARD)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": "1.7"},
        {"x_note": {"any": ["thing", 1.5]}},
        {"writer": {"someone": "else"}},
    ],
)
def test_what_a_reader_must_accept(folder, pristine, change):
    tampering.reseal(folder, lambda document: document.update(change))
    assert read_everything(folder) == read_everything(pristine)


def test_alias_is_read_as_its_target(folder):
    _alias()(folder)
    tensors = read_everything(folder)
    assert tensors["tied"] == tensors["l"]


def test_pristine_manifest_is_canonical_json(pristine):
    document = json.loads((pristine / MANIFEST_NAME).read_bytes())
    assert list(document)[-1] == "manifest_sha256"
