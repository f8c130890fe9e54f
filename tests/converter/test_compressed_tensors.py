"""The compressed-tensors export: exact codes and scales, or one error and no files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from codecllm.converter import ParamsChoice, convert
from codecllm.converter.exports.compressed_tensors import plan_layout
from codecllm.converter.exports.export import export
from codecllm.converter.exports.packed_words import WIDTHS, holds, least_width, pack_codes
from codecllm.converter.plan.params import QuantParams
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


def unpack(words, cols, width=8):
    """The other direction, bit by bit, written from the layout's description alone."""
    rows = []
    for row in words.tolist():
        bits = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        codes = [(bits >> (width * place)) & ((1 << width) - 1) for place in range(cols)]
        rows.append([code - (1 << (width - 1)) for code in codes])
        assert bits >> (width * cols) == 0
    return np.array(rows, np.int8).reshape(len(rows), cols)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7), (2, 123), (4, 64), (0, 4)])
def test_packing(shape, width):
    half = 1 << (width - 1)
    codes = RNG.integers(-half, half, shape, dtype=np.int8)
    words = pack_codes(codes, width)
    assert words.dtype == np.dtype("<i4")
    assert words.shape == (shape[0], -(-shape[1] * width // 32))
    assert np.array_equal(unpack(words, shape[1], width), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_is_the_librarys(width):
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="the package compressed-tensors is not installed (extra 'test')",
    )
    import torch

    half = 1 << (width - 1)
    codes = RNG.integers(-half, half, (7, 77), dtype=np.int8)
    theirs = helpers.pack_to_int32(torch.from_numpy(codes), width)
    assert np.array_equal(pack_codes(codes, width), theirs.numpy())


def test_packed_words_byte_for_byte():
    words = pack_codes(np.array([[-127, 0, 127, 1, 5]], np.int8), 8)
    assert words.tobytes() == bytes([1, 128, 255, 129, 133, 0, 0, 0])
    words = pack_codes(np.array([[-4, 3, 0]], np.int8), 3)  # 0, 7, 4
    assert words.tolist() == [[0 | 7 << 3 | 4 << 6]]


def test_the_fewest_bits():
    assert [least_width(0, 0), least_width(-4, 3), least_width(-4, 4)] == [2, 3, 4]
    assert [least_width(-127, 127), least_width(-128, 0), least_width(0, 128)] == [8, 8, None]
    assert holds(4, -8, 7)
    assert not holds(4, -9, 0)


def test_export_holds_the_containers_codes_and_scales(container, tmp_path):
    with Container(container) as opened:
        layout = plan_layout(opened, LINEAR)
        assert layout.packed == {
            "a.proj.weight",
            "b.proj.weight",
            "odd.weight",
            "moe.experts.0.up.weight",
        }
        assert layout.width == 8
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
            layout=plan_layout(opened, LINEAR),
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
        layout = plan_layout(opened, LINEAR)
    with pytest.raises(ChecksumError):
        export(container, tmp_path / "packed", layout=layout)
    assert not (tmp_path / "packed").exists()


def test_what_has_nothing_to_pack_is_refused(container, tmp_path):
    convert(tmp_path / "source", tmp_path / "lossless", scheme="lossless")
    with (
        Container(tmp_path / "lossless") as opened,
        pytest.raises(UsageError, match="this container is lossless"),
    ):
        plan_layout(opened, LINEAR)
    convert(tmp_path / "source", tmp_path / "few", include=("embed*",), exclude=("*.proj*",))
    with Container(tmp_path / "few") as opened, pytest.raises(UsageError, match="no int8 tensor"):
        plan_layout(opened, LINEAR)


def steps(largest):
    """Returns a provider of steps with which the largest code of each row is `largest[name]`."""

    def choose(plan):
        words = plan.source.read_elements(0, plan.source.entry.elements)
        weights = np.abs(words.view(np.float32).reshape(plan.matrix))
        return QuantParams(weights.max(axis=1) / np.float32(largest.get(plan.source.name, 6)))

    return choose


def with_codes(tmp_path, largest, include=("*",)):
    shapes = {"m.q": (8, 64), "m.k": (4, 64), "m.o": (64, 40), "other": (16, 64)}
    shapes |= {f"moe.experts.{number}.up": (8, 64) for number in (0, 1)}
    tensors = {
        f"{name}.weight": ("F32", RNG.standard_normal(shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    source = sources.write_source(tmp_path / "s", tensors, {"model_type": "llama"})
    choice = ParamsChoice(steps(largest))
    convert(source, tmp_path / "c", include=include, choice=choice)
    return Container(tmp_path / "c")


MODULES = ("m.q", "m.k", "m.o", "other")


@pytest.mark.parametrize(("largest", "width"), [(1, 2), (6, 4), (15, 5), (31, 6), (63, 7)])
def test_the_width_that_holds_all_codes(tmp_path, largest, width):
    with with_codes(tmp_path, {"m.o.weight": largest, "m.q.weight": min(largest, 2)}) as opened:
        # m.k and the others have codes up to 6.
        width = max(width, 4)
        layout = plan_layout(opened, MODULES)
        assert (layout.width, len(layout.packed), layout.ignore) == (width, 6, ())
        assert layout.notes == (f"6 of 6 tensors of linear layers have {width} bits a code",)
        export(tmp_path / "c", tmp_path / "p", layout=layout)
        written = load_file(tmp_path / "p" / "model.safetensors")
        for name in layout.packed:
            codes = read_codes(opened.tensor(name))
            assert np.array_equal(unpack(written[name + "_packed"], codes.shape[1], width), codes)
    block = json.loads((tmp_path / "p" / "config.json").read_text())["quantization_config"]
    assert block["config_groups"]["group_0"]["weights"]["num_bits"] == width


def test_a_width_that_is_asked_for(tmp_path):
    with with_codes(tmp_path, {"m.o.weight": 9}) as opened:
        assert plan_layout(opened, MODULES).width == 5
        assert plan_layout(opened, MODULES, width=8).width == 8
        with pytest.raises(UsageError) as caught:
            plan_layout(opened, MODULES, width=4)
        with pytest.raises(UsageError, match="bits of a packed code, got 9, expected 2 to 8"):
            plan_layout(opened, MODULES, width=9)
    assert str(caught.value) == (
        "tensor 'm.o.weight': codes do not fit into 4 bits, and none is ever clipped; 5 bits hold "
        "all codes of this container, got -9 to 9, expected -8 to 7"
    )


def test_codes_beyond_eight_bits_leave_their_siblings_plain(tmp_path):
    with with_codes(tmp_path, {"m.k.weight": 200}) as opened:
        layout = plan_layout(opened, MODULES)
        # q has as many inputs as k: an engine may fuse them. o has others.
        names = {"m.o.weight", "other.weight"}
        names |= {f"moe.experts.{number}.up.weight" for number in (0, 1)}
        assert (layout.packed, layout.ignore) == (names, ("m.k", "m.q"))
        assert layout.notes[1] == (
            "1 have codes beyond 8 bits and are written plainly, and 1 beside them: m.k.weight"
        )
        with pytest.raises(UsageError, match=r"m\.k.*do not fit into 8 bits.*got -200 to"):
            plan_layout(opened, MODULES, width=8)


def test_one_plain_expert_leaves_all_plain(tmp_path):
    with with_codes(tmp_path, {"moe.experts.1.up.weight": 200}) as opened:
        layout = plan_layout(opened, MODULES)
        assert layout.packed == {f"{name}.weight" for name in MODULES}
        assert layout.ignore == ("moe.experts.0.up", "moe.experts.1.up")


def test_a_lossless_sibling(tmp_path):
    with with_codes(tmp_path, {}, include=("m.q*", "m.o*")) as opened:
        layout = plan_layout(opened, MODULES)
        assert layout.packed == {"m.o.weight"}
        assert layout.ignore == ("m.k", "m.q", "moe.experts.0.up", "moe.experts.1.up", "other")
