"""Tiny models that vLLM's attention on a CPU takes: heads of 32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.integration.tiny_models import save

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=False))


def _qwen2() -> Any:
    """Biases, and a head that is tied to the embedding."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, tie_word_embeddings=True))


def _phi3() -> Any:
    """Matrices that the checkpoint itself holds fused."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**sizes, tie_word_embeddings=False))


def _qwen3_moe() -> Any:
    config = hf.Qwen3MoeConfig(
        **SIZES,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    return hf.Qwen3MoeForCausalLM(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "qwen3_moe": _qwen3_moe,
}


def make(name: str, folder: Path) -> Path:
    """Saves a model; `llama_alias` is a Llama whose head equals its embedding and is not tied."""
    is_alias = name == "llama_alias"
    model = _llama() if is_alias else BUILDERS[name]()
    save(folder, model)
    if is_alias:
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.save_pretrained(folder)
    return folder
