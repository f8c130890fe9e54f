"""`codecllm compare` finds each differing weight, and no difference where there is none."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from codecllm.converter import convert
from codecllm.formats.errors import (
    ChecksumError,
    LayoutError,
    TruncatedError,
    UnsafePathError,
    UsageError,
)
from codecllm.formats.reference import read_tensor_bytes
from codecllm.verifier.model_comparison import aligned, compare_models
from tests import tampering
from tests.diagnosis import faults


def _rows(found):
    return {row["name"]: row for row in found["tensors"]}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_lossless_container_is_its_source(container, tiny, name):
    found = compare_models(container(name, "lossless"), tiny(name), run=False)
    assert found["same"], found
    assert found["stored_bytes"][0] < found["stored_bytes"][1] * 1.5
    assert len(found["tensors"]) > 10


def test_int8_against_lossless(container, tiny):
    from codecllm.formats.container import Container

    found = compare_models(container("llama", "lossless"), container("llama", "int8"))
    assert not found["same"]
    rows, source = _rows(found), load_file(tiny("llama") / "model.safetensors")
    with Container(container("llama", "int8")) as opened:
        for name, weights in source.items():
            other = torch.frombuffer(
                bytearray(read_tensor_bytes(opened, name)), dtype=weights.dtype
            ).reshape(weights.shape)
            a, b = weights.double(), other.double()
            assert rows[name]["relative_error"] == pytest.approx(
                float((a - b).norm() / a.norm()), rel=1e-9
            )
            assert rows[name]["worst_error"] == float((a - b).abs().max())
            assert rows[name]["differing"] == int(
                (weights.view(torch.int16) != other.view(torch.int16)).sum()
            )
    assert rows["model.norm.weight"]["same"]
    assert 0 < found["outputs"]["mean_kl"] < 0.1
    assert len(found["outputs"]["prompts"]) == 8


def test_one_changed_weight_is_found_and_nan_is_no_number(tmp_path, tiny):
    def edit(tensors):
        tensors[faults.UP][3, 5] = float("nan")
        tensors["extra"] = torch.ones(3)

    other = faults.edit_source(tiny("llama"), tmp_path / "other", edit)
    found = compare_models(tiny("llama"), other, run=False)
    assert [row["name"] for row in found["tensors"] if not row["same"]] == [faults.UP]
    row = _rows(found)[faults.UP]
    assert (row["differing"], row["relative_error"], row["worst_error"]) == (1, None, None)
    assert found["only_in_b"] == ["extra"]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"rope_theta": 5.0}),
        ("config.json", {"hidden_act": "gelu"}),
        ("generation_config.json", {"temperature": 0.1}),
        ("tokenizer_config.json", {"add_bos_token": True}),
    ],
)
def test_files_that_say_other_things_are_another_model(container, tiny, tmp_path, file, change):
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    document = json.loads((other / file).read_text()) if (other / file).exists() else {}
    (other / file).write_text(json.dumps(document | change, indent=7))
    found = compare_models(container("llama", "lossless"), other, run=False)
    assert found["files"] == [file] and not found["same"]
    assert all(row["same"] for row in found["tensors"])


def test_other_spelling_of_the_same_values_is_no_difference(container, tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    config = json.loads((other / "config.json").read_text())
    config |= {"transformers_version": "0", "_name_or_path": "x"}
    (other / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    (other / "LICENSE.txt.md").write_text("other terms")
    found = compare_models(container("llama", "lossless"), other, run=False)
    assert found["same"] and found["files"] == []


def test_the_order_of_added_tokens_is_a_difference(tiny, tmp_path):
    """Tokens that the vocabulary lacks get their ids in it."""
    folders = [tmp_path / "a", tmp_path / "b"]
    tokens = {"x_token": "<x>", "y_token": "<y>"}
    for folder, names in zip(
        folders, (["x_token", "y_token"], ["y_token", "x_token"]), strict=True
    ):
        shutil.copytree(tiny("llama"), folder)
        settings = {"extra_special_tokens": {name: tokens[name] for name in names}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = compare_models(*folders, run=False)
    assert found["files"] == ["tokenizer_config.json"] and not found["same"]
    assert compare_models(folders[0], folders[0], run=False)["same"]


def test_damage_and_strangers_are_errors(tmp_path, container, tiny):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, faults.UP))
    with pytest.raises(ChecksumError, match="up_proj"):
        compare_models(folder, tiny("llama"), run=False)
    with pytest.raises(UsageError, match="share no tensor"):
        compare_models(tiny("llama"), tiny("bert"), run=False)


def _as_fifo(path):
    path.unlink()
    os.mkfifo(path)


def _as_link(path):
    path.unlink()
    path.symlink_to("/etc/passwd")


def _as_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_as_fifo, UnsafePathError),
        (_as_link, UnsafePathError),
        (_as_device, UnsafePathError),
        (lambda path: os.truncate(path, 1 << 32), LayoutError),
        (lambda path: path.unlink(), TruncatedError),
        (lambda path: path.write_bytes(path.read_bytes().swapcase()), ChecksumError),
    ],
)
def test_listed_files_are_checked_before_they_are_read(tmp_path, container, tiny, change, error):
    """The manifest decides, also where both sides have the same damage."""
    folder = tampering.copy_of(container("llama", "lossless"), tmp_path / "c")
    tampering.add_listed(folder, "tokenizer.json", b'{"a": 1}')
    other = tampering.copy_of(folder, tmp_path / "other")
    for sides in ((folder,), (folder, other)):
        change(sides[-1] / "tokenizer.json")
        with pytest.raises(error) as caught:
            compare_models(folder, other, run=False)
        assert caught.value.file == "tokenizer.json"


@pytest.mark.parametrize(
    "name",
    [
        *("own.py", "vocab.bpe", "bpe.codes", "sentencepiece.vocab", "a.merges", "x.npz"),
        *("tokenizer.yaml", "voices.pt", "sub/chat.jinja", "2_Dense/model.safetensors"),
    ],
)
def test_any_file_that_a_class_may_read_counts(tmp_path, container, name):
    folders = [
        tampering.copy_of(container("llama", "lossless"), tmp_path / side) for side in ("a", "b")
    ]
    for folder, content in zip(folders, (b"x = 1", b"x = 2"), strict=True):
        tampering.add_listed(folder, name, content)
    found = compare_models(*folders, run=False)
    assert found["files"] == [name] and not found["same"]


def test_code_counts_where_a_file_names_it_or_both_bring_it(tmp_path, tiny):
    plain = tmp_path / "plain"
    shutil.copytree(tiny("llama"), plain)
    (plain / "own.py").write_text("x = 1")
    without, with_code = tmp_path / "without", tmp_path / "with"
    convert(plain, without, scheme="lossless")
    convert(plain, with_code, scheme="lossless", with_code=True)
    for other in (without, with_code):
        assert compare_models(plain, other, run=False)["files"] == []
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.Own"}}))
    convert(plain, without, scheme="lossless", force=True)
    convert(plain, with_code, scheme="lossless", with_code=True, force=True)
    assert compare_models(plain, without, run=False)["files"] == ["own.py"]
    assert compare_models(plain, with_code, run=False)["same"]


def test_streams_are_aligned():
    whole = np.arange(1000)
    left, right = np.split(whole, [1, 17, 400]), np.split(whole, [250, 251, 999])
    pairs = list(aligned(iter(left), iter(right)))
    assert all((a == b).all() for a, b in pairs)
    assert np.array_equal(np.concatenate([a for a, _ in pairs]), whole)
