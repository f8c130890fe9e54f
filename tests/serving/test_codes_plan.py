"""Which layers keep codes. Needs no engine."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from codecllm.converter import ParamsChoice, convert
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.serving.codes_plan import CodedLayer, CodesPlan
from tests.serving import served_models
from tests.stepped import make_steps, mixed

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.1.mlp"
EMBEDDING = (512, 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("plan")
    source = served_models.make("qwen2", base / "s")
    exclude = ("*norm*", "*layers.0*down_proj*", "*layers.1*v_proj*")
    choice = ParamsChoice(mixed)
    convert(source, base / "c", include=("*.weight",), exclude=exclude, choice=choice)
    return base / "c"


@pytest.fixture
def plan(folder):
    with Container(folder) as container:
        return CodesPlan(container)


def test_a_fused_layer_waits_for_all_of_its_parts(plan):
    assert plan.names == set()
    got = plan.linear(f"{ATTENTION}.qkv_proj", QKV, 128)
    # q has no scales of columns.
    assert got == CodedLayer(f"{ATTENTION}.qkv_proj", parts=8, wide=False, has_columns=True)
    assert plan.names == {f"{ATTENTION}.{name}.weight" for name in QKV}


def test_wide_codes_are_announced(plan):
    got = plan.linear(f"{MLP}.gate_up_proj", ("gate_proj", "up_proj"), 128)
    assert got == CodedLayer(f"{MLP}.gate_up_proj", parts=6, wide=True, has_columns=True)


@pytest.mark.parametrize(
    ("prefix", "members", "columns"),
    [
        ("model.layers.1.self_attn.qkv_proj", QKV, 128),  # v is not int8
        ("model.layers.0.mlp.down_proj", ("down_proj",), 256),
        (f"{ATTENTION}.o_proj", ("o_proj",), 64),  # another shape
        (f"{ATTENTION}.other", ("other",), 128),
        ("", ("",), 128),
    ],
)
def test_other_layers_are_dense(plan, prefix, members, columns):
    assert plan.linear(prefix, members, columns) is None
    assert plan.names == set()


def test_a_matrix_that_is_fused_in_the_checkpoint(tmp_path):
    source = served_models.make("phi3", tmp_path / "s")
    convert(source, tmp_path / "c", include=("*.weight",), exclude=("*norm*",))
    with Container(tmp_path / "c") as container:
        plan = CodesPlan(container)
    name = f"{ATTENTION}.qkv_proj"
    assert plan.linear(name, QKV, 128) == CodedLayer(name, 2, wide=False, has_columns=False)
    assert plan.names == {f"{name}.weight"}


def test_engines_rename(plan):
    assert plan.linear(f"language_{ATTENTION}.o_proj", ("o_proj",), 128) is None
    plan.rename(lambda name: f"language_{name}" if "self_attn" in name else None)
    plan.rename(lambda name: name)
    assert plan.linear(f"language_{ATTENTION}.o_proj", ("o_proj",), 128) is not None
    assert plan.names == {f"{ATTENTION}.o_proj.weight"}


@pytest.mark.parametrize("prefix", ["", "model.embed_tokens"])
def test_a_head_without_weights_follows_the_embedding(plan, prefix):
    embedding = plan.embedding(prefix, EMBEDDING)
    assert embedding == CodedLayer("model.embed_tokens", 3, wide=False, has_columns=True)
    assert plan.head("lm_head", EMBEDDING) == embedding
    assert plan.names == {"model.embed_tokens.weight"}


def test_an_embedding_stays_dense_where_its_head_was_made_dense_before(plan):
    assert plan.head("lm_head", EMBEDDING) is None
    assert plan.embedding("model.embed_tokens", EMBEDDING) is None


def test_an_embedding_of_another_size_is_dense(plan):
    assert plan.embedding("model.embed_tokens", (513, 128)) is None


def test_a_head_with_weights_of_its_own(tmp_path):
    source = served_models.make("llama", tmp_path / "s")
    convert(source, tmp_path / "c", include=("lm_head*", "*embed*"), exclude=("*layers*",))
    with Container(tmp_path / "c") as container:
        plan = CodesPlan(container)
    assert plan.head("lm_head", EMBEDDING) == CodedLayer("lm_head", 2, False, False)
    assert plan.names == {"lm_head.weight"}


def test_a_container_without_codes(tmp_path):
    source = served_models.make("llama", tmp_path / "s")
    convert(source, tmp_path / "c", scheme="lossless")
    with Container(tmp_path / "c") as container, pytest.raises(UsageError, match="no codes"):
        CodesPlan(container)


def test_layers_that_pack_keep_lossless_weights_too(tmp_path):
    source = served_models.make("llama", tmp_path / "s")
    exclude = ("*norm*", "*layers.1*", "*layers.0*v_proj*")
    convert(source, tmp_path / "c", include=("*.weight",), exclude=exclude)
    with Container(tmp_path / "c") as container:
        plan = CodesPlan(container, packs=True)
    name = "model.layers.1.self_attn.qkv_proj"
    expected = CodedLayer(name, 3, wide=False, has_columns=False, packs=True, is_weights=True)
    assert plan.linear(name, QKV, 128) == expected
    assert plan.names == set()  # they are handed over as weights
    got = plan.linear(f"{ATTENTION}.o_proj", ("o_proj",), 128)
    assert got == CodedLayer(f"{ATTENTION}.o_proj", 2, False, False, packs=True)
    # Codes beside weights: such a layer is dense.
    assert plan.linear(f"{ATTENTION}.qkv_proj", QKV, 128) is None


def test_a_container_without_anything_to_pack(tmp_path):
    save_file({"a.weight": torch.ones(8, 24)}, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "c", scheme="lossless")
    with Container(tmp_path / "c") as container, pytest.raises(UsageError, match="BF16"):
        CodesPlan(container, packs=True)


EXPERTS = "model.layers.1.mlp.experts"
MEMBERS = {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}


@pytest.mark.parametrize(
    ("exclude", "count", "here", "parts"),
    [
        ((), 8, range(8), 48),
        ((), 8, (2, 5), 12),  # the others are on another rank
        (("*layers.1.*experts.7.up*",), 8, range(8), None),
        (("*layers.0.*",), 8, range(8), 48),
        ((), 9, range(9), None),
    ],
)
def test_experts_keep_codes_together(tmp_path, exclude, count, here, parts):
    source = served_models.make("qwen3_moe", tmp_path / "s")
    convert(source, tmp_path / "c", include=("*.weight",), exclude=("*norm*", *exclude))
    with Container(tmp_path / "c") as container:
        plan = CodesPlan(container)
    got = plan.experts(EXPERTS, MEMBERS, count, here)
    if parts is None:
        assert (got, plan.names) == (None, set())
        return
    assert got == CodedLayer(EXPERTS, parts, wide=False, has_columns=False)
    # Those of other ranks are handed over as codes too, and left out there.
    assert len(plan.names) == 3 * count
    assert plan.experts(EXPERTS, {**MEMBERS, "up_proj": (64, 64)}, count, here) is None


def test_wide_experts_stay_dense_where_the_layer_takes_none(tmp_path):
    source = served_models.make("qwen3_moe", tmp_path / "s")
    choice = ParamsChoice(lambda plan: make_steps(plan, 0.02, columns=False))
    convert(source, tmp_path / "c", include=("*.weight",), exclude=("*norm*",), choice=choice)
    with Container(tmp_path / "c") as container:
        plan = CodesPlan(container)
    assert plan.experts(EXPERTS, MEMBERS, 8, range(8), takes_wide=False) is None
    assert plan.names == set()
    assert plan.experts(EXPERTS, MEMBERS, 8, range(8)).wide
