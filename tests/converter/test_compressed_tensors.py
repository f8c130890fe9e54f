"""The compressed-tensors export: exact codes and scales, or one error and no files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from codecllm.converter import convert
from codecllm.converter.exports.compressed_tensors import pack_codes, packed_columns, plan_layout
from codecllm.converter.exports.export import export
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, UsageError
from codecllm.formats.reference import read_codes, read_run_codes, read_tensor_bytes
from tests import sources, tampering

RNG = np.random.default_rng(3)
LINEAR = ("a.proj", "b.proj", "odd", "small", "head")


@pytest.fixture
def container(tmp_path):
    shapes = {
        "a.proj.weight": (96, 64),
        "b.proj.weight": (300, 1024),  # several tiles of whole rows
        "odd.weight": (37, 301),
        "embed.weight": (50, 16),
        "conv.weight": (64, 32, 9),
        "small.weight": (2, 2),
        "tied.weight": (130, 127),
        "experts.0.weight": (64, 48),
        "moe.experts.0.up.weight": (64, 48),
    }
    tensors = {
        name: ("F32", RNG.standard_normal(shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    tensors["head.weight"] = tensors["tied.weight"]
    tensors["norm.weight"] = ("F32", np.ones(11, np.float32))
    source = sources.write_source(tmp_path / "source", tensors, {"model_type": "llama"})
    out = tmp_path / "out"
    convert(source, out, scheme="int8", include=("*",), exclude=("small.weight",))
    return out


def unpack(words, cols):
    """The other direction, written from the layout's description alone."""
    rows = []
    for row in words.tolist():
        codes = []
        for word in row:
            codes += [((word >> shift) & 0xFF) - 128 for shift in (0, 8, 16, 24)]
        rows.append(codes[:cols])
    return np.array(rows, np.int8)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7), (2, 123), (0, 4)])
def test_packing(shape):
    codes = RNG.integers(-127, 128, shape, dtype=np.int8)
    words = pack_codes(codes)
    assert words.dtype == np.dtype("<i4")
    assert words.shape == (shape[0], packed_columns(shape[1]))
    if codes.size:
        assert np.array_equal(unpack(words, shape[1]), codes)


def test_packed_words_byte_for_byte():
    words = pack_codes(np.array([[-127, 0, 127, 1, 5]], np.int8))
    assert words.tobytes() == bytes([1, 128, 255, 129, 133, 0, 0, 0])


def test_export_holds_the_containers_codes_and_scales(container, tmp_path):
    with Container(container) as opened:
        layout = plan_layout(opened.manifest, LINEAR)
        assert layout.packed == {
            "a.proj.weight",
            "b.proj.weight",
            "odd.weight",
            "moe.experts.0.up.weight",
        }
        assert layout.ignore == ("conv", "embed", "experts.0", "head", "small", "tied")
        export(container, tmp_path / "packed", layout=layout)
        written = load_file(tmp_path / "packed" / "model.safetensors")
        for name in layout.packed:
            tensor = opened.tensor(name)
            codes = read_codes(tensor)
            assert np.array_equal(unpack(written[name + "_packed"], codes.shape[1]), codes)
            assert written[name + "_scale"].shape == (codes.shape[0], 1)
            assert written[name + "_scale"].tobytes() == tensor.scales.tobytes()
            assert written[name + "_shape"].tolist() == list(codes.shape)
            assert name not in written
        for name in (
            "embed.weight",
            "head.weight",
            "tied.weight",
            "conv.weight",
            "small.weight",
            "norm.weight",
        ):
            assert written[name].tobytes() == read_tensor_bytes(opened, name)
    block = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == "compressed-tensors"
    assert block["format"] == "pack-quantized"
    assert block["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert block["ignore"] == list(layout.ignore)


def test_tiles_are_read_as_the_whole_is(container):
    with Container(container) as opened:
        tensor = opened.tensor("b.proj.weight")
        assert len(tensor.table.grid) > 1
        tiles = read_run_codes(tensor, range(len(tensor.table.grid)))
        assert np.array_equal(np.concatenate(tiles), read_codes(tensor))


def test_several_shards_have_an_index(container, tmp_path):
    with Container(container) as opened:
        report = export(
            container,
            tmp_path / "packed",
            layout=plan_layout(opened.manifest, LINEAR),
            max_shard_bytes=50_000,
        )
    assert len(report.shards) > 1
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    held = {
        name: shard for shard in report.shards for name in load_file(tmp_path / "packed" / shard)
    }
    assert index["weight_map"] == held
    sizes = sum(
        value.nbytes
        for shard in report.shards
        for value in load_file(tmp_path / "packed" / shard).values()
    )
    assert index["metadata"]["total_size"] == report.tensor_bytes == sizes


def test_damage_leaves_nothing(container, tmp_path):
    path, byte = tampering.payload_place(container, "a.proj.weight")
    tampering.flip_bit(path, byte)
    with Container(container) as opened:
        layout = plan_layout(opened.manifest, LINEAR)
    with pytest.raises(ChecksumError):
        export(container, tmp_path / "packed", layout=layout)
    assert not (tmp_path / "packed").exists()


def test_what_has_nothing_to_pack_is_refused(container, tmp_path):
    convert(tmp_path / "source", tmp_path / "lossless", scheme="lossless")
    with (
        Container(tmp_path / "lossless") as opened,
        pytest.raises(UsageError, match="this container is lossless"),
    ):
        plan_layout(opened.manifest, LINEAR)
    with Container(container) as opened, pytest.raises(UsageError, match="no int8 tensor"):
        plan_layout(
            opened.manifest.model_copy(update={"tensors": opened.manifest.tensors[:1]}), ("other",)
        )
