"""Names, shapes and configuration of a Llama with random weights, for benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

FULL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""Widths of Llama 3.1 8B."""


def matrix_shapes(sizes: dict[str, int], layers: int) -> dict[str, tuple[int, int]]:
    """Returns rows and columns of each matrix by its name in a checkpoint.

    Args:
        sizes: of the configuration, `vocab_size` too.
        layers: their number.
    """
    hidden, inner, words = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    parts = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(layers):
        for name, shape in parts.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["lm_head.weight"] = (words, hidden)
    return shapes


def norm_names(layers: int) -> list[str]:
    """Returns the names of the norms, vectors of `hidden_size`."""
    of_layers = [
        f"model.layers.{layer}.{name}_layernorm.weight"
        for layer in range(layers)
        for name in ("input", "post_attention")
    ]
    return [*of_layers, "model.norm.weight"]


def write_config(folder: Path, sizes: dict[str, int], layers: int) -> None:
    """Writes config.json for weights in bf16."""
    config = {
        **sizes,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "dtype": "bfloat16",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
