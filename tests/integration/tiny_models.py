"""Tiny models of several architectures, made from their configs with fixed seeds and saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}


def save(folder: Path, model: Any, *, max_shard_size: str = "5GB", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Saves a model in `dtype`; weights are drawn so that no two tensors are alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def llama(folder: Path, *, tied: bool = True, max_shard_size: str = "5GB", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Llama with or without tied embeddings."""
    config = transformers.LlamaConfig(**_COMMON, tie_word_embeddings=tied)
    return save(folder, transformers.LlamaForCausalLM(config), max_shard_size=max_shard_size, dtype=dtype)


def gpt2(folder: Path) -> Path:
    """A GPT-2: Conv1D layers, whose output channel is the last dimension."""
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_positions=64)
    return save(folder, transformers.GPT2LMHeadModel(config), dtype=torch.float32)


def qwen3_moe(folder: Path) -> Path:
    """A mixture of experts whose checkpoint holds one matrix per expert, fused when it is loaded."""
    config = transformers.Qwen3MoeConfig(
        **_COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, tie_word_embeddings=False
    )
    return save(folder, transformers.Qwen3MoeForCausalLM(config))


def t5(folder: Path) -> Path:
    """An encoder-decoder with an embedding shared between both."""
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=512, decoder_start_token_id=0
    )
    return save(folder, transformers.T5ForConditionalGeneration(config), dtype=torch.float32)


def bert(folder: Path) -> Path:
    """An encoder with a classification head."""
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    return save(folder, transformers.BertForSequenceClassification(config), dtype=torch.float16)


MAKERS = {"llama": llama, "gpt2": gpt2, "qwen3_moe": qwen3_moe, "t5": t5, "bert": bert}
