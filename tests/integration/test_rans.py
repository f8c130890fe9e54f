"""A container with codec `rans` is used like any other and gives the same bits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from codecllm.converter import ConvertOptions, convert, estimate
from codecllm.converter.exports.export import export
from codecllm.formats.codecs import RANS_ID
from codecllm.formats.container import Container
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.info import describe
from codecllm.loader import from_pretrained, stream_tensors
from codecllm.verifier import verify
from tests.sources import bf16, write_source

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Groups of chunks with unlike distributions, long rows, a tensor outside int8's range."""
    rng = np.random.default_rng(5)
    spread = np.repeat([1.0, 8.0, 0.5, 3.0], 400)[:, None]
    broken = rng.standard_normal((300, 300)).astype(np.float32)
    broken[5, 7] = np.nan
    tensors = {
        "groups": ("BF16", bf16(spread * rng.standard_normal((1600, 1000))).reshape(1600, 1000)),
        "broken": ("F32", broken),
        "long": ("F32", (rng.standard_normal((2, 300_001)) ** 3).astype(np.float32)),
        "h.0.attn.c_attn.weight": ("F32", rng.standard_normal((300, 500)).astype(np.float32)),
        "mask": ("BOOL", rng.integers(0, 2, (300, 300)).astype(np.uint8)),
        "noise": ("U8", rng.integers(0, 256, (300, 300)).astype(np.uint8)),
        "norm": ("F32", np.ones(64, np.float32)),
    }
    return write_source(tmp_path_factory.mktemp("rans") / "source", tensors, {"model_type": "gpt2"})


@pytest.fixture(scope="module", params=["int8", "lossless"])
def pair(request, source, tmp_path_factory):
    """The same model with either codec."""
    base, made = tmp_path_factory.mktemp("pair"), {}
    for codec in ("zstd", "rans"):
        convert(source, base / codec, scheme=request.param, codec=codec, non_finite="lossless")
        made[codec] = base / codec
    return made


def test_tensors_have_the_bits_of_the_other_codec(pair):
    with Container(pair["zstd"]) as zstd, Container(pair["rans"]) as coded:
        assert {name: record.scheme for name, record in coded.records.items()} == {
            name: record.scheme for name, record in zstd.records.items()
        }
        for name in zstd.records:
            assert read_tensor_bytes(coded, name) == read_tensor_bytes(zstd, name), name
        expected = {record.name: tensor for record, tensor in stream_tensors(zstd)}
        for workers in (1, 3):
            for record, tensor in stream_tensors(coded, workers=workers):
                assert torch.equal(
                    tensor.view(-1).view(torch.uint8),
                    expected[record.name].view(-1).view(torch.uint8),
                )


def test_groups_have_tables_of_their_own(pair):
    with Container(pair["rans"]) as container:
        tensor = container.tensor("groups")
        assert isinstance(tensor, StoredTensor)
        assert tensor.tables is not None
        assert len(tensor.tables.groups) == 2
        first, last = tensor.tables.table(0, 0), tensor.tables.table(len(tensor.table.grid) - 1, 0)
        assert not np.array_equal(first.frequencies, last.frequencies)


def test_one_tile_decodes_alone(pair):
    with Container(pair["rans"]) as container:
        tensor = container.tensor("groups")
        assert isinstance(tensor, StoredTensor)
        planes, tile = tensor.table.planes, tensor.table.grid.tile(9)
        slots = tensor.read_slots(9 * planes, 9 * planes + 1, bytearray(1 << 20))
        symbols = tensor.decode_chunk(9 * planes, slots, 9 * planes)
        assert tensor.table.chunks[9 * planes].codec == RANS_ID
        assert symbols.size == tile.symbols


def test_planes_that_do_not_shrink_stay_raw(pair):
    with Container(pair["rans"]) as container:
        assert container.records["noise"].scheme == "raw"
        if container.manifest.options.scheme == "lossless":
            assert [plane.codec for plane in container.records["groups"].planes] == ["rans", "raw"]
        assert container.manifest.required_features == ["rans"]
    with Container(pair["zstd"]) as container:
        assert container.manifest.required_features == []
        assert container.manifest.options.codec is None


def test_verify_and_info_count_the_tables(pair):
    report = verify(pair["rans"])
    assert report.ok, report.to_json()
    facts = describe(pair["rans"])
    (groups,) = (tensor for tensor in facts["tensors"] if tensor["name"] == "groups")
    with Container(pair["rans"]) as container:
        record = container.records["groups"]
        planes = sum(plane.stored_bytes for plane in record.planes)
        scales = 4 * 1600 if record.scheme == "int8" else 0
        assert record.tables_bytes > 100
        assert groups["stored_bytes"] == planes + scales + record.tables_bytes
    assert "rans" in groups["codec"]


def test_export_is_the_same(pair, tmp_path):
    digests = []
    for codec, folder in pair.items():
        export(folder, tmp_path / codec)
        digests.append(
            hashlib.sha256((tmp_path / codec / "model.safetensors").read_bytes()).hexdigest()
        )
    assert digests[0] == digests[1]


def test_estimates_are_near(source, pair):
    with Container(pair["rans"]) as container:
        options = ConvertOptions(
            scheme=container.manifest.options.scheme, codec="rans", non_finite="lossless"
        )
        predicted = estimate(source, options)
        assert abs(predicted.stored_bytes / container.stored_bytes - 1) < 0.03


def test_a_source_without_coded_tensors_needs_no_feature(tmp_path):
    source = write_source(tmp_path / "source", {"norm": ("F32", np.ones(9, np.float32))})
    convert(source, tmp_path / "out", codec="rans")
    with Container(tmp_path / "out") as container:
        assert container.manifest.required_features == []


@pytest.mark.parametrize("resident", ["dense", "int8", "compressed"])
def test_models_give_the_same_logits(tiny, tmp_path, resident):
    ids = torch.arange(3, 23).reshape(2, 10)
    logits = []
    for codec in ("zstd", "rans"):
        convert(tiny("llama"), tmp_path / codec, codec=codec, include=("*",))
        model = from_pretrained(tmp_path / codec, resident=resident)
        with torch.inference_mode():
            logits.append(model(ids)[0])
    assert torch.equal(*logits)
