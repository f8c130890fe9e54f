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


IMAGE_TOKEN = "<image>"
_SPECIAL = (
    *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)),
    "<end_of_utterance>",
    "<global-img>",
    "<fake_token_around_image>",
    IMAGE_TOKEN,
)


def _idefics3() -> Any:
    """Sees images: SmolVLM's architecture, whose processor needs no torchvision."""
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = hf.Idefics3Config(
        vision_config=vision,
        text_config=hf.LlamaConfig(**SIZES).to_dict(),
        image_token_id=SIZES["vocab_size"] - 1,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return hf.Idefics3ForConditionalGeneration(config)


def _save_processor(folder: Path) -> None:
    """Saves a tokenizer of the words w0, w1 and so on, and what turns images into patches."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{number}" for number in range(SIZES["vocab_size"] - len(_SPECIAL))]
    vocabulary = {word: number for number, word in enumerate([*words, *_SPECIAL])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w3",
        bos_token="w1",
        eos_token="w2",
        pad_token="w0",
        additional_special_tokens=list(_SPECIAL),
    )
    size = {"longest_edge": 32}
    images = hf.Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    hf.Idefics3Processor(image_processor=images, tokenizer=fast, image_seq_len=4).save_pretrained(
        folder
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "idefics3": _idefics3,
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
    if name == "idefics3":
        _save_processor(folder)
    return folder
