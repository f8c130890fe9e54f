"""vLLM's own options over a container: LoRA adapters, and overrides of the model's config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.serving.engine import IDS, distance, why_not
from tests.serving.test_vllm_codes import CODES

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(900),
]
LORA = {"enable_lora": True, "max_lora_rank": 8}
RANK = 8
SHAPES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.v_proj": (64, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}
"""Shapes of the matrices of `served_models.SIZES` that the adapter changes."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter in the layout of PEFT for the tiny models."""
    folder = tmp_path_factory.mktemp("adapter")
    random = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        for name, (rows, cols) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, cols, generator=random) * 0.3
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=random) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted({name.rpartition(".")[2] for name in SHAPES}),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_over_a_container(engine, made, adapter):
    container, plain = made("qwen2", "mixed")
    options = {"dtype": "float32", **LORA}
    answers = [
        engine.ask(container, IDS, adapter=adapter, **options),
        engine.ask(plain, IDS, adapter=adapter, dtype="float32", **LORA),
        engine.ask(container, IDS, adapter=adapter, **options, **CODES),
        engine.ask(container, IDS, **options, **CODES),
    ]
    for answer in answers:
        assert "outputs" in answer, answer
    dense, expected, codes, without = (answer["outputs"] for answer in answers)
    # The plain form has weights of bfloat16, the container's are rounded to float32.
    assert distance(dense, expected) < 0.1
    assert distance(codes, dense) < 1e-3
    assert distance(codes, without) > 0.2


def test_adapters_and_experts(engine, made):
    """vLLM runs none of them together on a CPU, plain models neither; it says the same of both."""
    container, plain = made("qwen3_moe", "all_int8")
    answers = [engine.ask(plain, IDS, **LORA), engine.ask(container, IDS, **LORA, **CODES)]
    assert answers[0] == answers[1]
    assert "triton" in answers[0]["message"]


OVERRIDES = {"rms_norm_eps": 0.5}


@pytest.mark.parametrize("options", [{}, CODES], ids=["dense", "codes"])
def test_overrides_of_the_config(engine, made, options):
    container, plain = made("llama", "all_int8")
    served = engine.outputs(container, IDS, hf_overrides=OVERRIDES, **options)
    expected = engine.outputs(plain, IDS, hf_overrides=OVERRIDES)
    assert distance(served, expected) < 0.25
    if not options:
        assert served == expected
    assert distance(served, engine.outputs(container, IDS, **options)) > 0.05


def test_an_override_that_leaves_tensors_over(engine, made):
    container, _ = made("llama", "all_int8")
    answer = engine.ask(container, IDS, hf_overrides={"num_hidden_layers": 1})
    assert "error" in answer, answer


def test_an_override_that_takes_our_block_away(engine, made):
    """vLLM then reads stored bytes as weights, and stops at their shape."""
    container, _ = made("llama", "all_int8")
    answer = engine.ask(container, IDS, hf_overrides={"quantization_config": None})
    assert "error" in answer, answer
