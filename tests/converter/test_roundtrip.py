"""Lossless is bit for bit, for every dtype; shards are ordinary safetensors files."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from codecllm.converter import convert
from codecllm.converter.exports.export import export
from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.reference import read_tensor_bytes, tensor_digest
from tests.sources import bf16, write_sharded_source, write_source

SHAPES = [
    (),
    (1,),
    (0, 7),
    (7, 0),
    (1, 1),
    (5, 123),
    (64, 64),
    (1, 65_537),
    (65_537, 3),
    (3, 5, 70),
    (2, 1, 3, 4, 90),
]


def _random(dtype, shape, seed=0):
    """Bit patterns of a type: ordinary values for floats, small numbers for integers."""
    rng = np.random.default_rng(seed)
    if dtype == "BF16":
        return bf16(rng.standard_normal(shape) * 0.02).reshape(shape)
    if dtype in ("F16", "F32", "F64"):
        return (rng.standard_normal(shape) * 0.02).astype(
            {"F16": "f2", "F32": "f4", "F64": "f8"}[dtype]
        )
    if dtype == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 9, shape).astype(f"<u{DTYPES[dtype].itemsize}")


def _check(source, out):
    with SourceModel(source) as model, Container(out) as container:
        assert model.tensors.keys() == container.records.keys()
        for name, tensor in model.tensors.items():
            assert read_tensor_bytes(container, name) == tensor.read_bytes(0, tensor.entry.bytes), (
                name
            )
            record = container.records[name]
            if record.scheme != "alias":
                assert tensor_digest(container, name) == record.digest
        return {name: record.scheme for name, record in container.records.items()}


@pytest.mark.parametrize("dtype", [name for name, dtype in DTYPES.items() if dtype.bits % 8 == 0])
def test_lossless_keeps_every_dtype(tmp_path, dtype):
    shapes = {
        f"t{number}": (dtype, _random(dtype, shape, number)) for number, shape in enumerate(SHAPES)
    }
    source = write_source(tmp_path / "source", shapes)
    convert(source, tmp_path / "out", scheme="lossless")
    _check(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "scheme"), [("BF16", "lossless"), ("F16", "lossless"), ("U16", "lossless")]
)
def test_all_65536_patterns_survive(tmp_path, dtype, scheme):
    ordered = np.arange(1 << 16, dtype=np.uint16)
    mixed = np.random.default_rng(0).permutation(ordered)
    tensors = {
        "ordered": (dtype, ordered.reshape(64, 1024)),
        "mixed": (dtype, mixed.reshape(1024, 64)),
    }
    # Beside many ordinary values the exponents shrink, so that the patterns go through the codec
    # too.
    usual = _random(dtype, (1024, 1024)).view(np.uint16)
    usual[:64] = mixed.reshape(64, 1024)
    tensors["among others"] = (dtype, usual)
    source = write_source(tmp_path / "source", tensors)
    convert(source, tmp_path / "out", scheme=scheme)
    assert _check(source, tmp_path / "out")["among others"] == "lossless"


def test_sub_byte_types_are_stored_plainly(tmp_path):
    packed = np.arange(24, dtype=np.uint8)
    folder = tmp_path / "source"
    folder.mkdir()
    header = b'{"w":{"dtype":"F4","shape":[6,8],"data_offsets":[0,24]}}'
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + packed.tobytes()
    )
    convert(folder, tmp_path / "out", scheme="lossless")
    assert _check(folder, tmp_path / "out") == {"w": "raw"}


def test_every_stored_shape_of_a_coded_tensor_differs_from_the_parameters(tmp_path):
    """A reader without codecllm gets a shape error, no random weights: payloads are U8 [bytes]."""
    tensors = {f"w{rows}": ("F32", _random("F32", (rows, 256))) for rows in (16, 64, 700)}
    source = write_source(
        tmp_path / "source", {**tensors, "norm": ("F32", np.ones(32, np.float32))}
    )
    for scheme, include in (("int8", ("*",)), ("lossless", ())):
        out = tmp_path / scheme
        convert(source, out, scheme=scheme, include=include)
        with safe_open(out / "model-00001-of-00001.safetensors", framework="numpy") as file:
            for name in tensors:
                view = file.get_slice(name)
                assert (view.get_dtype(), len(view.get_shape())) == ("U8", 1)
            assert file.get_slice("norm").get_dtype() == "F32"


def test_shards_are_ordinary_safetensors(tmp_path):
    source = write_source(tmp_path / "source", {"w": ("F32", _random("F32", (300, 300)))})
    convert(source, tmp_path / "out", include=("*",))
    assert set(load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")) == {
        "w",
        "w_scale",
        "w_shape",
        "w_chunks",
    }


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 200_000])
def test_export_of_a_lossless_container_is_the_source(tmp_path, max_shard_bytes):
    shards = [
        {f"a{i}": ("BF16", _random("BF16", (256, 300), i)) for i in range(4)},
        {"b": ("I64", _random("I64", (9,)))},
    ]
    shards[1]["tied"] = shards[0]["a1"]
    source = write_sharded_source(tmp_path / "source", shards)
    convert(source, tmp_path / "out", scheme="lossless", max_shard_bytes=max_shard_bytes)
    export(tmp_path / "out", tmp_path / "plain", max_shard_bytes=max_shard_bytes)
    with SourceModel(source) as before, SourceModel(tmp_path / "plain") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name, tensor in before.tensors.items():
            other = after.tensors[name]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape)
            assert tensor.read_bytes(0, tensor.entry.bytes) == other.read_bytes(
                0, other.entry.bytes
            )


def test_export_of_int8_is_the_dequantized_model(tmp_path):
    source = write_source(tmp_path / "source", {"w": ("BF16", _random("BF16", (300, 300)))})
    convert(source, tmp_path / "out", include=("*",))
    export(tmp_path / "out", tmp_path / "plain")
    with Container(tmp_path / "out") as container, SourceModel(tmp_path / "plain") as plain:
        assert plain.tensors["w"].read_bytes(0, 180_000) == read_tensor_bytes(container, "w")
