"""Sources: aliases, shards, refused and damaged files, and an output that is never overwritten."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from codecllm.converter import ConvertOptions, convert, estimate
from codecllm.converter.plan.conversion_plan import _place
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    FormatError,
    NotAContainerError,
    OutputExistsError,
    SchemaError,
    SourceError,
    TruncatedError,
    UnsafePathError,
    UnsafeSourceError,
    UsageError,
)
from codecllm.formats.reference import read_tensor_bytes
from tests.sources import bf16, write_sharded_source, write_source


def _weights(rows=256, cols=300, seed=0):
    return "BF16", bf16(np.random.default_rng(seed).standard_normal((rows, cols))).reshape(
        rows, cols
    )


def _one(tmp_path):
    return write_source(tmp_path / "source", {"a": _weights()}, {"model_type": "llama"})


def _refused(source, tmp_path, error, words):
    with pytest.raises(error, match=words) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_identical_tensors_are_stored_once(tmp_path):
    source = write_source(
        tmp_path / "source", {"a": _weights(), "b": _weights(), "c": _weights(seed=1)}
    )
    report = convert(source, tmp_path / "out", scheme="lossless")
    assert {r.name: r.scheme for r in report.manifest.tensors} == {
        "a": "lossless",
        "b": "alias",
        "c": "lossless",
    }
    with Container(tmp_path / "out") as container:
        assert read_tensor_bytes(container, "b") == _weights()[1].tobytes()


def test_identical_bits_of_another_type_or_shape_are_not_aliases(tmp_path):
    dtype, words = _weights()
    tensors = {"a": (dtype, words), "b": ("F16", words), "c": (dtype, words.reshape(300, 256))}
    report = convert(
        write_source(tmp_path / "source", tensors), tmp_path / "out", scheme="lossless"
    )
    assert [record.scheme for record in report.manifest.tensors].count("alias") == 0


def test_a_large_model_has_many_shards():
    def sizes(count, tensor, most=5_000_000_000):
        plans = [SimpleNamespace(max_stored_bytes=tensor) for _ in range(count)]
        return [len(shard) for shard in _place(plans, most)]

    assert sizes(4, 120_000_000) == [4]
    assert sizes(9, 120_000_000) == [4, 4, 1]  # not longer than 500 MB
    assert sizes(400, 100_000_000) == [25] * 16
    assert set(sizes(400, 100_000_000, 1_000_000_000)[:-1]) == {9}
    assert set(sizes(1600, 100_000_000)[:-1]) == {49}
    assert sizes(2, 900_000_000) == [1, 1]


def test_max_shard_bytes(tmp_path):
    source = write_source(tmp_path / "source", {f"t{i}": _weights(seed=i) for i in range(6)})
    report = convert(source, tmp_path / "out", scheme="lossless", max_shard_bytes=300_000)
    assert len(report.manifest.shards) == 3 or len(report.manifest.shards) == 6
    for shard in report.manifest.shards:
        assert shard.bytes <= 300_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {
        f"t{i}{side}" for i in range(6) for side in ("", "_shape", "_chunks")
    }
    assert index["metadata"]["total_parameters"] == 6 * 256 * 300


def test_pickles_are_refused(tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("pytorch_model.bin", "model.pt", "model.pkl"):
        (tmp_path / "source" / name).write_bytes(b"\x80\x02")
    _refused(tmp_path / "source", tmp_path, UnsafeSourceError, "pickle")


def test_nothing_to_convert(tmp_path):
    (tmp_path / "source").mkdir()
    _refused(tmp_path / "source", tmp_path, SourceError, "safetensors")
    with pytest.raises(SourceError, match="no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_container_as_source_is_refused(tmp_path):
    convert(_one(tmp_path), tmp_path / "c")
    with pytest.raises(SourceError, match="container already"):
        convert(tmp_path / "c", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"a": "../evil.safetensors"}, CodecLLMError),
        ({"a": "/etc/passwd"}, CodecLLMError),
        ({"a": "model-00009-of-00009.safetensors"}, CodecLLMError),
        ({"a": 7}, CodecLLMError),
    ],
)
def test_index_that_does_not_fit_is_refused(tmp_path, change, error):
    source = write_sharded_source(tmp_path / "source", [{"a": _weights()}, {"b": _weights(seed=1)}])
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(change)
    path.write_text(json.dumps(index))
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "out")
    assert isinstance(caught.value, SourceError | FormatError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_index_with_traversal_reads_nothing_outside(tmp_path):
    source = write_sharded_source(tmp_path / "source", [{"a": _weights()}])
    (tmp_path / "evil.safetensors").write_bytes(
        (source / "model-00001-of-00001.safetensors").read_bytes()
    )
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../evil.safetensors"}})
    )
    with pytest.raises((UnsafeSourceError, UnsafePathError)) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.exit_code == 5


def test_lfs_pointer_in_place_of_weights(tmp_path):
    source = _one(tmp_path)
    (source / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    _refused(source, tmp_path, NotAContainerError, "Git LFS pointer")


def test_truncated_weights(tmp_path):
    source = _one(tmp_path)
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-1000])
    _refused(source, tmp_path, TruncatedError, "ends inside its data")


def test_damaged_config_is_refused(tmp_path):
    source = _one(tmp_path)
    (source / "config.json").write_text('{"model_type": ')
    _refused(source, tmp_path, SchemaError, "JSON")


def test_source_that_changes_while_it_is_read(tmp_path):
    source = _one(tmp_path)

    def touch(name, done, total):
        os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(SourceError, match="changed"):
        convert(source, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_no_config_is_a_warning(tmp_path):
    report = convert(write_source(tmp_path / "source", {"a": _weights()}), tmp_path / "out")
    assert any("config.json" in warning for warning in report.warnings)


def test_output_is_never_overwritten_unasked(tmp_path):
    source, out = _one(tmp_path), tmp_path / "out"
    convert(source, out)
    before = (out / "codecllm.json").read_bytes()
    with pytest.raises(OutputExistsError, match="--force"):
        convert(source, out, scheme="lossless")
    assert (out / "codecllm.json").read_bytes() == before
    convert(source, out, scheme="lossless", force=True)
    assert (out / "codecllm.json").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for force in (False, True):
        with pytest.raises(OutputExistsError, match="not a container"):
            convert(source, tmp_path / "mine", force=force)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="not a folder"):
        convert(source, tmp_path / "file")


def test_force_leaves_files_that_are_not_ours(tmp_path):
    source, out = _one(tmp_path), tmp_path / "out"
    convert(source, out, max_shard_bytes=50_000)
    (out / "README.md").write_text("a card")
    (out / "notes.txt").write_text("mine")
    convert(source, out, force=True)
    assert (out / "README.md").read_text() == "a card"
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.glob("*.safetensors"))) == 1


def test_options_are_checked():
    with pytest.raises(UsageError, match="workers"):
        ConvertOptions(workers=0)
    with pytest.raises(UsageError, match="max_shard_bytes"):
        ConvertOptions(max_shard_bytes=0)


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_estimate_is_close(tmp_path, scheme):
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}": ("BF16", bf16(rng.standard_normal((900, 1500)) * 0.02).reshape(900, 1500))
        for i in range(3)
    }
    tensors |= {"tied": tensors["t0"], "norm": ("F32", np.ones(900, np.float32))}
    source = write_source(tmp_path / "source", tensors)
    predicted = estimate(source, ConvertOptions(scheme=scheme))
    report = convert(source, tmp_path / "out", scheme=scheme)
    assert abs(predicted.stored_bytes - report.stored_bytes) < 0.02 * report.stored_bytes
    assert [tensor.name for tensor in predicted.tensors] == list(tensors)


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    source = write_source(
        tmp_path / "source",
        {"a": _weights(), "b": _weights(), "n": ("F32", np.ones(9, np.float32))},
    )
    convert(source, tmp_path / "out", progress=lambda *args: seen.append(args))
    assert seen[-1][1:] == (2 * 256 * 300 + 36,) * 2
    assert all(a[1] <= b[1] for a, b in pairwise(seen))
