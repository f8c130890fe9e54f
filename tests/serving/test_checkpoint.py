"""A container as a checkpoint: names, order, aliases, codes. Needs no engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codecllm.converter import ParamsChoice, convert
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, ModelMismatchError
from codecllm.formats.reference import read_codes
from codecllm.loader import stream_tensors
from codecllm.loader.torch_tensors import file_order
from codecllm.serving.checkpoint import Checkpoint, holds_codes
from tests import tampering
from tests.serving import served_models
from tests.stepped import WIDE, mixed

NARROW = "model.layers.0.self_attn.q_proj.weight"
COLUMNS = "model.layers.0.mlp.down_proj.weight"
TARGET, ALIAS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("checkpoint")
    source = served_models.make("llama_alias", base / "s")
    choice = ParamsChoice(mixed)
    convert(source, base / "c", include=("*.weight",), exclude=("*norm*",), choice=choice)
    return base / "c"


def _taken(container, **options):
    checkpoint = Checkpoint(container, workers=2, **options)
    taken = list(checkpoint.tensors())
    checkpoint.check_complete()
    return taken


def test_every_name_comes_once_in_the_order_of_the_files(folder):
    with Container(folder) as container:
        taken = _taken(container)
        expected = {record.name: tensor for record, tensor in stream_tensors(container)}
        stored = [name for name, _ in taken if name in expected]
        assert stored == list(file_order(container))
        assert [name for name, _ in taken if name not in expected] == [ALIAS]
        for name, tensor in taken:
            assert torch.equal(tensor, expected[TARGET if name == ALIAS else name])


def test_an_alias_follows_its_target_as_another_object(folder):
    with Container(folder) as container:
        taken = _taken(container)
        names = [name for name, _ in taken]
        place = names.index(TARGET)
        assert names[place + 1] == ALIAS
        target, alias = taken[place][1], taken[place + 1][1]
        target.shard_id = "q"  # as vLLM does
        assert not hasattr(alias, "shard_id")
        assert alias.data_ptr() == target.data_ptr()


def test_only_int8_tensors_take_the_dtype(tmp_path):
    source = served_models.make("llama", tmp_path / "s")
    convert(source, tmp_path / "c", include=("*q_proj*",), exclude=("*k_proj*",))
    with Container(tmp_path / "c") as container:
        dtypes = {name: tensor.dtype for name, tensor in _taken(container, dtype=torch.float16)}
        for name, record in container.records.items():
            is_int8 = record.scheme == "int8"
            assert dtypes[name] == (torch.float16 if is_int8 else torch.bfloat16)


def test_skipped_names_are_not_read(folder, tmp_path):
    damaged = tampering.copy_of(folder, tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(damaged, COLUMNS))
    with Container(damaged) as container:
        with pytest.raises(ChecksumError) as caught:
            _taken(container)
        assert caught.value.tensor == COLUMNS
        names = [name for name, _ in _taken(container, skips=lambda name: name == COLUMNS)]
        assert sorted([*names, COLUMNS]) == sorted(container.records)


def test_codes_and_scales_follow_their_name(folder):
    wanted = {NARROW, COLUMNS, WIDE}
    with Container(folder) as container:
        assert all(holds_codes(container.records[name]) for name in wanted)
        assert not holds_codes(container.records["model.norm.weight"])
        taken = dict(_taken(container, as_codes=lambda name: name in wanted))
        for name in wanted:
            stored = container.tensor(name)
            codes = read_codes(stored)
            assert taken[name].dtype == (torch.int16 if name == WIDE else torch.int8)
            assert np.array_equal(taken[name].numpy(), codes)
            assert np.array_equal(taken[f"{name}_scale"].numpy(), stored.scales)
            assert (f"{name}_col_scale" in taken) == (stored.columns is not None)
            if stored.columns is not None:
                assert np.array_equal(taken[f"{name}_col_scale"].numpy(), stored.columns.scales)
        assert taken[ALIAS].dtype == torch.bfloat16


def test_one_name_of_a_shared_tensor_as_codes(folder):
    with Container(folder) as container:
        taken = dict(_taken(container, as_codes=lambda name: name == ALIAS))
    assert taken[TARGET].dtype == torch.bfloat16
    assert taken[ALIAS].dtype == torch.int8


def test_a_model_that_stops_early_is_an_error(folder):
    with Container(folder) as container:
        checkpoint = Checkpoint(container)
        tensors = checkpoint.tensors()
        next(tensors)
        tensors.close()
        with pytest.raises(ModelMismatchError, match=r"got \d+ tensors that were not taken"):
            checkpoint.check_complete()
