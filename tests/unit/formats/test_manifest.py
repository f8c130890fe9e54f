"""The contents of a manifest, and its exact text.

tests/malformed/test_manifest.py has the refused ones.
"""

from __future__ import annotations

import json

import pytest

from codecllm.formats import FORMAT_VERSION, limits
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.errors import LimitError, SchemaError
from codecllm.formats.manifest.manifest import Manifest, manifest_sha256, pack_manifest, shard_name
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.formats.manifest.records import (
    AliasTensor,
    FileRecord,
    Int8Tensor,
    LosslessTensor,
    Options,
    PlaneRecord,
    RawTensor,
    ShardRecord,
    SideChecksums,
    Source,
)
from codecllm.formats.shards.side_tensors import side_names

DIGEST, XXH3 = "ab" * 32, "0123456789abcdef"


def _raw(name="n", **fields):
    record = {
        "name": name,
        "dtype": "F32",
        "shape": [9],
        "scheme": "raw",
        "shard": 0,
        "digest": DIGEST,
        "xxh3": XXH3,
    }
    return RawTensor(**{**record, **fields})


def _coded(scheme, name="w", dtype="BF16", planes=2, **fields):
    record = {
        "name": name,
        "dtype": dtype,
        "shape": [4, 6],
        "scheme": scheme,
        "shard": 0,
        "tile": [4, 6],
        "planes": [PlaneRecord(codec="raw", raw_bytes=24, stored_bytes=24, entropy_bits=0)]
        * planes,
        "digest": DIGEST,
        "xxh3": SideChecksums(shape=XXH3, chunks=XXH3, scale=XXH3 if scheme == "int8" else None),
    }
    if scheme == "int8":
        record |= {
            "channel_axis": 0,
            "channel_kind": "row",
            "scale_range": [0.5, 1.0],
            "worst_error": 0.25,
        }
        return Int8Tensor(**{**record, **fields})
    return LosslessTensor(**{**record, **fields})


def _manifest(*tensors, **fields):
    values = {
        "format": "codecllm",
        "format_version": FORMAT_VERSION,
        "required_features": [],
        "writer": {"codecllm": "1.2.3"},
        "source": Source(repo=None, commit=None, tensor_bytes=36),
        "options": Options(
            scheme="int8", include=[], exclude=["*norm*"], non_finite="error", max_shard_bytes=5
        ),
        "shards": [ShardRecord(name=shard_name(1, 1), bytes=9, sha256=DIGEST, header_xxh3=XXH3)],
        "files": [FileRecord(name="config.json", bytes=2, sha256=DIGEST)],
        "tensors": list(tensors),
    }
    return Manifest(**{**values, **fields})


def test_exact_bytes():
    """One line a record, no spaces, absent keys left out, the seal last."""
    lines = pack_manifest(_manifest(_raw(fallback="why"))).decode().split("\n")
    assert lines[0] == '{"format":"codecllm",'
    assert lines[4] == '"source":{"repo":null,"commit":null,"tensor_bytes":36},'
    assert lines[7] == (
        f'{{"name":"model-00001-of-00001.safetensors","bytes":9,"sha256":"{DIGEST}",'
        f'"header_xxh3":"{XXH3}"}}'
    )
    assert lines[-4] == (
        f'{{"name":"n","dtype":"F32","shape":[9],"scheme":"raw","shard":0,"digest":"{DIGEST}",'
        f'"xxh3":"{XXH3}","fallback":"why"}}'
    )
    assert (lines[-3], lines[-2][:19], lines[-1]) == ("],", '"manifest_sha256":"', "")


def test_the_seal_covers_all_bytes_before_it():
    data = pack_manifest(_manifest(_raw()))
    place = data.rindex(b'"manifest_sha256"')
    assert data[place:] == f'"manifest_sha256":"{sha256_hex(data[:place])}"}}\n'.encode()
    assert manifest_sha256(data) == sha256_hex(data)
    assert json.loads(data)["manifest_sha256"] == sha256_hex(data[:place])


def test_every_kind_of_record_comes_back():
    manifest = _manifest(
        _raw(),
        _raw("packed", dtype="F4", shape=[3, 2]),
        _coded("lossless", "l"),
        _coded("int8", "q", planes=1),
        _coded("int8", "c", planes=1, channel_axis=1, channel_kind="column"),
        AliasTensor(name="tied", dtype="BF16", shape=[4, 6], scheme="alias", alias_of="l"),
    )
    data = pack_manifest(manifest)
    assert parse_manifest(data) == manifest
    assert pack_manifest(parse_manifest(data)) == data
    assert [record.source_bytes for record in manifest.tensors] == [36, 3, 48, 48, 48, 48]
    assert manifest.file("config.json").bytes == 2
    assert manifest.file("nothing") is None


def test_names_of_side_tensors():
    assert side_names(_raw("a")) == []
    assert side_names(_coded("lossless", "a")) == ["a_shape", "a_chunks"]
    assert side_names(_coded("int8", "a", planes=1)) == ["a_scale", "a_shape", "a_chunks"]


@pytest.mark.parametrize("name", ["w_shape", "w_chunks", "w_scale"])
def test_a_tensor_named_like_the_side_data_of_another_is_refused(name):
    """Both records would be read from the same stored tensor."""
    with pytest.raises(SchemaError, match="side tensor") as caught:
        _manifest(_coded("int8", planes=1), _raw(name))
    assert caught.value.tensor == name


def test_a_tensor_named_like_side_data_that_does_not_exist_is_read():
    assert (
        len(_manifest(_coded("lossless"), _raw("w_scale"), _raw("n_chunks"), _raw()).tensors) == 4
    )


@pytest.mark.parametrize("dtype", ["F64", "I64", "F8_E4M3", "U8", "BOOL"])
def test_int8_of_a_type_that_it_does_not_take_is_refused(dtype):
    """It parsed, and reading it raised an error that was none of ours."""
    with pytest.raises(SchemaError, match="does not fit"):
        _manifest(_coded("int8", dtype=dtype, planes=1))


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F6_E2M3", "F4", "C64"])
def test_lossless_of_a_type_that_it_does_not_take_is_refused(dtype):
    with pytest.raises(SchemaError, match="does not fit"):
        _manifest(_coded("lossless", dtype=dtype, planes=1))


def test_the_longest_lists():
    files = [FileRecord(name=f"f{i}", bytes=0, sha256=DIGEST) for i in range(limits.FILES + 1)]
    assert len(parse_manifest(pack_manifest(_manifest(files=files[:-1]))).files) == limits.FILES
    with pytest.raises(LimitError, match="files"):
        parse_manifest(
            pack_manifest(Manifest.model_construct(**{**dict(_manifest()), "files": files}))
        )


def test_a_manifest_that_is_too_long_is_neither_written_nor_read(monkeypatch):
    data = pack_manifest(_manifest(_raw()))
    monkeypatch.setattr(limits, "MANIFEST_BYTES", len(data))
    assert parse_manifest(data)
    monkeypatch.setattr(limits, "MANIFEST_BYTES", len(data) - 1)
    with pytest.raises(LimitError, match="too long"):
        parse_manifest(data)
    with pytest.raises(LimitError, match="too long"):
        pack_manifest(_manifest(_raw()))
