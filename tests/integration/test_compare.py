"""`codecllm compare` finds each differing weight, and no difference where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from codecllm.formats.errors import ChecksumError, UsageError
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


def test_damage_and_strangers_are_errors(tmp_path, container, tiny):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, faults.UP))
    with pytest.raises(ChecksumError, match="up_proj"):
        compare_models(folder, tiny("llama"), run=False)
    with pytest.raises(UsageError, match="share no tensor"):
        compare_models(tiny("llama"), tiny("bert"), run=False)


def test_streams_are_aligned():
    whole = np.arange(1000)
    left, right = np.split(whole, [1, 17, 400]), np.split(whole, [250, 251, 999])
    pairs = list(aligned(iter(left), iter(right)))
    assert all((a == b).all() for a, b in pairs)
    assert np.array_equal(np.concatenate([a for a, _ in pairs]), whole)
