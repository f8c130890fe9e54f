"""Which files of a folder are the model: those that transformers would load, said in one line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    SourceError,
    TruncatedError,
    UnsafePathError,
    UnsafeSourceError,
)
from codecllm.formats.reference import read_tensor_bytes
from tests.sources import bf16, write_sharded_source, write_source

INDEX = "model.safetensors.index.json"


def _tensor(seed=0):
    return "BF16", bf16(np.random.default_rng(seed).standard_normal((64, 70)))


def _convert(source, tmp_path, **options):
    return convert(source, tmp_path / "out", scheme="lossless", **options)


def _bytes(tmp_path, name):
    with Container(tmp_path / "out") as container:
        return read_tensor_bytes(container, name)


def _index(source, change):
    path = source / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _left(report):
    return {one.name: one.reason for one in report.left}


def test_the_single_file_wins_over_a_sharded_set(tmp_path):
    source = write_sharded_source(tmp_path / "s", [{"a": _tensor(1)}, {"b": _tensor(2)}])
    single = write_source(tmp_path / "t", {"a": _tensor(3)})
    shutil.copy(single / "model.safetensors", source)
    report = _convert(source, tmp_path)
    assert report.taken == "model.safetensors: 1 tensors"
    assert _bytes(tmp_path, "a") == _tensor(3)[1].tobytes()
    assert [record.name for record in report.manifest.tensors] == ["a"]
    assert _left(report) == {
        "model-00001-of-00002.safetensors": "weights that the model does not load",
        "model-00002-of-00002.safetensors": "weights that the model does not load",
        INDEX: "index of weights that the model does not load",
    }


def test_a_left_over_index_is_named(tmp_path):
    source = write_source(tmp_path / "s", {"a": _tensor()})
    weight_map = {"a": "model-00001-of-00002.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    report = _convert(source, tmp_path)
    assert INDEX in _left(report)


def test_an_index_entry_without_a_tensor_is_said(tmp_path):
    source = write_sharded_source(tmp_path / "s", [{"a": _tensor(1)}, {"b": _tensor(2)}])
    _index(source, lambda weights: weights.update({"mtp.w": weights["b"]}))
    report = _convert(source, tmp_path)
    assert [record.name for record in report.manifest.tensors] == ["a", "b"]
    assert report.warnings[0] == f"{INDEX} names tensors that no file holds: mtp.w"


def test_a_tensor_that_the_index_lacks_is_taken(tmp_path):
    tensors = [{"a": _tensor(1)}, {"b": _tensor(2), "c": _tensor(3)}]
    source = write_sharded_source(tmp_path / "s", tensors)
    _index(source, lambda weights: weights.pop("c"))
    report = _convert(source, tmp_path)
    assert {record.name for record in report.manifest.tensors} == {"a", "b", "c"}
    assert report.warnings[0] == f"files hold tensors that {INDEX} lacks: c"


def test_a_tensor_in_another_file_than_the_index_says(tmp_path):
    source = write_sharded_source(tmp_path / "s", [{"a": _tensor(1)}, {"b": _tensor(2)}])
    _index(source, lambda weights: weights.update({"a": weights["b"], "b": weights["a"]}))
    report = _convert(source, tmp_path)
    assert _bytes(tmp_path, "a") == _tensor(1)[1].tobytes()
    assert report.warnings[:-1] == []


@pytest.mark.parametrize("equal", [True, False])
def test_a_tensor_in_two_files(tmp_path, equal):
    second = _tensor(1 if equal else 9)
    tensors = [{"a": _tensor(1), "c": _tensor(3)}, {"a": second, "b": _tensor(2)}]
    report = _convert(write_sharded_source(tmp_path / "s", tensors), tmp_path)
    assert _bytes(tmp_path, "a") == second[1].tobytes()
    said = [line for line in report.warnings if "with other values" in line]
    assert len(said) == (0 if equal else 1)


def test_a_shard_that_the_index_does_not_name_is_left(tmp_path):
    source = write_sharded_source(tmp_path / "s", [{"a": _tensor(1)}, {"b": _tensor(2)}])
    _index(source, lambda weights: weights.pop("b"))
    report = _convert(source, tmp_path)
    assert [record.name for record in report.manifest.tensors] == ["a"]
    assert "model-00002-of-00002.safetensors" in _left(report)


def test_an_index_of_other_files_says_so(tmp_path):
    source = write_sharded_source(tmp_path / "s", [{"a": _tensor(1)}])
    (source / "model-00001-of-00001.safetensors").rename(source / "weights.safetensors")
    with pytest.raises(TruncatedError, match=r"holds weights\.safetensors instead"):
        _convert(source, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_missing_is_named(tmp_path):
    source = write_sharded_source(tmp_path / "s", [{"a": _tensor(1)}, {"b": _tensor(2)}])
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TruncatedError, match="model-00002-of-00002") as caught:
        _convert(source, tmp_path)
    assert "instead" not in str(caught.value)


def test_weights_that_the_config_names(tmp_path):
    config = {"transformers_weights": "special.safetensors"}
    source = write_source(tmp_path / "s", {"a": _tensor(1)}, config)
    other = write_source(tmp_path / "t", {"a": _tensor(2)})
    (other / "model.safetensors").rename(source / "special.safetensors")
    report = _convert(source, tmp_path)
    assert _bytes(tmp_path, "a") == _tensor(2)[1].tobytes()
    assert "model.safetensors" in _left(report)
    # The container has no file of that name, which transformers would look for.
    assert "special.safetensors" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("name", ["../evil.safetensors", "/x.safetensors"])
def test_weights_outside_the_folder_that_the_config_names(tmp_path, name):
    source = write_source(tmp_path / "s", {"a": _tensor()}, {"transformers_weights": name})
    with pytest.raises(UnsafePathError):
        _convert(source, tmp_path)


def test_a_variant_alone_is_taken_and_said(tmp_path):
    source = write_source(tmp_path / "s", {"a": _tensor(1)})
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    report = _convert(source, tmp_path)
    assert "model.fp16.safetensors" in report.taken
    assert "model.fp16.safetensors" in report.warnings[0]


def test_a_sharded_variant_alone_is_taken(tmp_path):
    source = write_sharded_source(tmp_path / "s", [{"a": _tensor(1)}, {"b": _tensor(2)}])
    for number in (1, 2):
        name = f"model-0000{number}-of-00002"
        (source / f"{name}.safetensors").rename(source / f"{name}.bf16.safetensors")
    index = json.loads((source / INDEX).read_text().replace(".safetensors", ".bf16.safetensors"))
    (source / INDEX).unlink()
    (source / "model.safetensors.index.bf16.json").write_text(json.dumps(index))
    report = _convert(source, tmp_path)
    assert {record.name for record in report.manifest.tensors} == {"a", "b"}


def test_a_variant_beside_the_plain_file_is_left(tmp_path):
    source = write_source(tmp_path / "s", {"a": _tensor(1)})
    shutil.copy(source / "model.safetensors", source / "model.fp16.safetensors")
    shutil.copy(source / "model.safetensors", source / "consolidated.safetensors")
    report = _convert(source, tmp_path)
    assert set(_left(report)) == {"model.fp16.safetensors", "consolidated.safetensors"}


def test_several_variants_alone_are_an_error(tmp_path):
    source = write_source(tmp_path / "s", {"a": _tensor(1)})
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    shutil.copy(source / "model.fp16.safetensors", source / "model.bf16.safetensors")
    with pytest.raises(SourceError, match="several safetensors files"):
        _convert(source, tmp_path)


@pytest.mark.parametrize("is_alone", [True, False])
def test_parts_of_tensors_of_a_distributed_training(tmp_path, is_alone):
    """transformers reads them before model.safetensors, which may be older."""
    source = write_source(tmp_path / "s", {"a": _tensor()})
    name = "shard-00001-model-00001-of-00002.safetensors"
    if is_alone:
        (source / "model.safetensors").rename(source / name)
    else:
        shutil.copy(source / "model.safetensors", source / name)
    with pytest.raises(SourceError, match="a distributed checkpoint") as caught:
        _convert(source, tmp_path)
    assert caught.value.file == name


def test_other_folders_with_weights_are_left_whole(tmp_path):
    source = write_source(tmp_path / "s", {"a": _tensor(1)})
    for folder, file in (
        ("original", "consolidated.00.pth"),
        ("onnx", "model.onnx"),
        ("checkpoint-500", "model.safetensors"),
        (".cache/huggingface", "x.json"),
    ):
        (source / folder).mkdir(parents=True)
        (source / folder / file).write_text("x")
        (source / folder / "params.json").write_text("{}")
    report = _convert(source, tmp_path)
    assert _left(report) == {
        "original/": "folder with weights of its own",
        "onnx/": "folder with weights of its own",
        "checkpoint-500/": "folder with weights of its own",
        ".cache/": "hidden",
    }


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "user/base"}


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_an_adapter_says_what_to_do(tmp_path, weights):
    source = tmp_path / "s"
    source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    if weights is not None:
        (source / weights).write_bytes(b"x")
    with pytest.raises(SourceError, match=r"adapter \(LORA\) of 'user/base'.*merge") as caught:
        _convert(source, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_its_config(tmp_path):
    source = write_source(tmp_path / "s", {"base_model.q.lora_A.weight": _tensor()})
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="an unnamed base model"):
        _convert(source, tmp_path)


def test_an_adapter_beside_its_base_is_named(tmp_path):
    source = write_source(tmp_path / "s", {"a": _tensor()})
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (source / "adapter_model.safetensors").write_bytes(b"x")
    left = _left(_convert(source, tmp_path))
    assert all(
        "merge it" in left[name] for name in ("adapter_config.json", "adapter_model.safetensors")
    )


def test_weights_of_other_formats_are_named(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"model\.gguf"):
        _convert(tmp_path / "s", tmp_path)
    (tmp_path / "s" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsafeSourceError, match=r"pytorch_model\.bin"):
        _convert(tmp_path / "s", tmp_path)


# Links: the source is the user's own folder.


def _view(source, folder):
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_a_folder_of_links_to_another_place(tmp_path):
    source = write_sharded_source(tmp_path / "s", [{"a": _tensor(1)}, {"b": _tensor(2)}])
    (source / "config.json").write_text('{"model_type": "x"}')
    (source / "vocab.txt").write_text("v")
    report = _convert(_view(source, tmp_path / "view"), tmp_path)
    assert _bytes(tmp_path, "b") == _tensor(2)[1].tobytes()
    assert (tmp_path / "out" / "vocab.txt").read_text() == "v"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert any("first vocab.txt" in warning for warning in report.warnings)


def test_links_inside_the_folder_and_a_linked_folder(tmp_path):
    source = write_source(tmp_path / "s", {"a": _tensor()})
    (source / "blobs").mkdir()
    (source / "blobs" / "x.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("blobs/x.safetensors")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "rag.jinja").write_text("R")
    (source / "additional_chat_templates").symlink_to(tmp_path / "templates")
    _convert(source, tmp_path)
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text() == "R"


def test_a_link_to_the_folder_above_ends(tmp_path):
    source = write_source(tmp_path / "s", {"a": _tensor()})
    (source / "sub").mkdir()
    (source / "sub" / "up").symlink_to(source)
    report = _convert(source, tmp_path)
    assert any(name.endswith("up/") for name in _left(report))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, name):
    source = write_source(tmp_path / "s", {"a": _tensor()}, {"model_type": "x"})
    (source / name).unlink()
    (source / name).symlink_to(tmp_path / "gone")
    with pytest.raises((TruncatedError, SourceError)):
        _convert(source, tmp_path)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hub_cache(tmp_path):
    entry = tmp_path / "models--user--m"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = entry / "snapshots" / commit
    (entry / "blobs").mkdir(parents=True)
    source = write_source(tmp_path / "s", {"a": _tensor()}, {"model_type": "x"})
    (source / "vocab.txt").write_text("v")
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(entry / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    report = _convert(snapshot, tmp_path)
    assert report.warnings == []
