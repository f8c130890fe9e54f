"""Tiny models of many architectures, from configs with fixed seeds, as ordinary folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
EXPERTS: dict[str, Any] = {
    **GROUPED,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
TEXT_ONLY: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "vocab_size": 512,
}


def save(
    folder: Path, model: Any, *, max_shard_size: str = "5GB", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Saves a model in `dtype`; weights are drawn so that no two tensors are alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def llama(
    folder: Path,
    *,
    tied: bool = True,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A Llama with or without tied embeddings."""
    config = hf.LlamaConfig(**GROUPED, tie_word_embeddings=tied)
    return save(folder, hf.LlamaForCausalLM(config), max_shard_size=max_shard_size, dtype=dtype)


def _made(build: Callable[[], Any], dtype: torch.dtype, folder: Path) -> Path:
    return save(folder, build(), dtype=dtype)


def _vision() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**GROUPED), image_token_index=511
    )
    return hf.LlavaForConditionalGeneration(config)


def _whisper() -> Any:
    config = hf.WhisperConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=32,
        max_target_positions=32,
        num_mel_bins=16,
        decoder_start_token_id=1,
        **TEXT_ONLY,
    )
    return hf.WhisperForConditionalGeneration(config)


def _deepseek() -> Any:
    config = hf.DeepseekV3Config(
        **{**EXPERTS, "num_key_value_heads": 4},
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _gpt2() -> Any:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TEXT_ONLY)
    )


def _t5() -> Any:
    config = hf.T5Config(
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **TEXT_ONLY,
    )
    return hf.T5ForConditionalGeneration(config)


def _mamba() -> Any:
    return hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, **TEXT_ONLY)
    )


_ENCODER = {
    key: value for key, value in COMMON.items() if key not in ("bos_token_id", "eos_token_id")
}
_BUILDERS: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "llama_untied": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=False)),
        torch.float16,
    ),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16)), torch.bfloat16),
    "gemma3": (
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, head_dim=16)),
        torch.bfloat16,
    ),
    "mistral": (
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, head_dim=16)),
        torch.bfloat16,
    ),
    "phi": (lambda: hf.PhiForCausalLM(hf.PhiConfig(**GROUPED)), torch.bfloat16),
    "gpt2": (_gpt2, torch.float32),
    "gpt_neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON)), torch.float16),
    "falcon": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(num_kv_heads=2, **COMMON)),
        torch.bfloat16,
    ),
    "mamba": (_mamba, torch.float32),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**EXPERTS, head_dim=16, num_experts=4)),
        torch.bfloat16,
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
        ),
        torch.bfloat16,
    ),
    "gpt_oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
        ),
        torch.bfloat16,
    ),
    "deepseek_v3": (_deepseek, torch.bfloat16),
    "whisper": (_whisper, torch.float32),
    "t5": (_t5, torch.float32),
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**_ENCODER)), torch.float16),
    "mpnet": (lambda: hf.MPNetModel(hf.MPNetConfig(**COMMON)), torch.float32),
    "llava": (_vision, torch.bfloat16),
}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": llama,
    **{name: partial(_made, build, dtype) for name, (build, dtype) in _BUILDERS.items()},
}
"""Name -> function that saves the model into a folder and returns it."""
FEW = ("llama", "gpt2", "qwen3_moe", "t5", "bert")
"""A selection for tests that need not try every architecture."""
