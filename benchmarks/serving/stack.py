"""A stack of vLLM's own layers, shaped as a Llama, in a world of one rank; attention is torch's."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.parallel_state import (
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from codecllm.formats.container import Container
from codecllm.serving.checkpoint import Checkpoint
from codecllm.serving.codes_plan import CodesPlan
from codecllm.serving.vllm_codes import check_filled
from codecllm.serving.vllm_config import CodecLLMConfig, building

FUSED: dict[str, list[str]] = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
CACHE = 512
"""Positions of keys and values that every token attends to."""


@contextmanager
def one_rank() -> Iterator[None]:
    """Makes the groups that vLLM's layers ask for."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/world", 0, "gloo")
        initialize_model_parallel()
        yield
        cleanup_dist_env_and_memory()


class _Layer(nn.Module):
    def __init__(self, sizes: dict[str, int], config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        self.heads, self.kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        self.size = hidden // self.heads
        named: dict[str, Any] = {"bias": False, "quant_config": config}
        attention = f"{prefix}.self_attn"
        self.qkv_proj = QKVParallelLinear(
            hidden,
            self.size,
            self.heads,
            self.kv_heads,
            prefix=f"{attention}.qkv_proj",
            **named,
        )
        self.o_proj = RowParallelLinear(hidden, hidden, prefix=f"{attention}.o_proj", **named)
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner, inner], prefix=f"{prefix}.mlp.gate_up_proj", **named
        )
        self.down_proj = RowParallelLinear(inner, hidden, prefix=f"{prefix}.mlp.down_proj", **named)

    def forward(self, hidden: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """Returns the hidden states, [tokens, hidden], of one new token a sequence."""
        normed = functional.rms_norm(hidden, hidden.shape[-1:])
        parts = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        query, key, value = (
            part.view(len(hidden), -1, 1, self.size)
            for part in self.qkv_proj(normed)[0].split(parts, dim=-1)
        )
        cache[0][:, :, -1:], cache[1][:, :, -1:] = key, value
        seen = functional.scaled_dot_product_attention(query, *cache, enable_gqa=True)
        hidden = hidden + self.o_proj(seen.reshape(hidden.shape))[0]
        both = self.gate_up_proj(functional.rms_norm(hidden, hidden.shape[-1:]))[0]
        gate, up = both.chunk(2, dim=-1)
        return hidden + self.down_proj(functional.silu(gate) * up)[0]


class Stack(nn.Module):
    """Embedding, layers and head."""

    def __init__(self, sizes: dict[str, int], layers: int, config: Any) -> None:
        """Builds the layers with the methods of a quantization config, or dense without one."""
        super().__init__()
        self.sizes = sizes
        words, hidden = sizes["vocab_size"], sizes["hidden_size"]
        self.embed_tokens = VocabParallelEmbedding(
            words, hidden, quant_config=config, prefix="model.embed_tokens"
        )
        self.layers = nn.ModuleList(
            _Layer(sizes, config, f"model.layers.{number}") for number in range(layers)
        )
        self.lm_head = ParallelLMHead(words, hidden, quant_config=config, prefix="lm_head")

    def forward(self, token: torch.Tensor, caches: list[Any]) -> torch.Tensor:
        """Returns the next greedy tokens, int64 [sequences], for tokens int64 [sequences]."""
        hidden = self.embed_tokens(token)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, cache)
        normed = functional.rms_norm(hidden, hidden.shape[-1:])
        logits = self.lm_head.quant_method.apply(self.lm_head, normed, bias=None)
        return logits[:, : self.sizes["vocab_size"]].argmax(-1)

    def caches(self, batch: int) -> list[Any]:
        """Returns keys and values for a number of sequences."""
        size = self.sizes["hidden_size"] // self.sizes["num_attention_heads"]
        shape = (batch, self.sizes["num_key_value_heads"], CACHE, size)
        weight = next(self.parameters())
        made = torch.randn(2, *shape, device=weight.device, dtype=torch.bfloat16)
        return [(made[0].clone(), made[1].clone()) for _ in self.layers]


def build(folder: Path, resident: str, device: torch.device) -> Stack:
    """Returns the stack of a container's model, filled as the plug-in fills a model of vLLM.

    Args:
        folder: a container of a Llama.
        resident: `dense`, `int8` or `packed`.
        device: where it lies.
    """
    sizes = json.loads((folder / "config.json").read_text())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with Container(folder) as container, device:
            plan = None
            if resident != "dense":
                plan = CodesPlan(container, packs=resident == "packed")
            config = None if plan is None else CodecLLMConfig()
            if config is not None:
                config.packed_modules_mapping = FUSED
            with building(plan) as made:
                stack = Stack(sizes, sizes["num_hidden_layers"], config)
            names = set() if plan is None else plan.names
            checkpoint = Checkpoint(
                container, dtype=torch.bfloat16, device=device, as_codes=names.__contains__
            )
            parameters = dict(stack.named_parameters())
            for name, tensor in checkpoint.tensors():
                if "norm" not in name:
                    _fill(parameters, name, tensor)
            checkpoint.check_complete()
            check_filled(made.layers)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in stack.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
    return stack.requires_grad_(False)


def _fill(parameters: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
    """Hands a tensor of the checkpoint to the loader of its parameter, as vLLM's models do."""
    short = name.removeprefix("model.").replace("self_attn.", "").replace("mlp.", "")
    for fused, members in FUSED.items():
        for index, member in enumerate(members):
            if f".{member}." in short:
                parameter = parameters[short.replace(member, fused)]
                shard = index if fused == "gate_up_proj" else member[0]
                parameter.weight_loader(parameter, tensor, shard)
                return
    parameter = parameters[short]
    parameter.weight_loader(parameter, tensor)


def products(stack: Stack) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """Yields the name of each matrix of the first layer, and of the head, with its product."""
    for name, layer in stack.layers[0].named_children():
        yield name, lambda inputs, layer=layer: layer(inputs)[0]
    head = stack.lm_head
    yield "lm_head", lambda inputs: head.quant_method.apply(head, inputs, bias=None)


def dense_weights(folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the dense weights of the matrices of `products`, by their names."""
    parts: dict[str, list[tuple[str, torch.Tensor]]] = {}
    with Container(folder) as container:
        checkpoint = Checkpoint(container, dtype=torch.bfloat16, device=device, skips=_is_other)
        for name, tensor in checkpoint.tensors():
            member = name.split(".")[-2]
            fused = next((key for key, members in FUSED.items() if member in members), member)
            parts.setdefault(fused, []).append((member, tensor))
    return {
        fused: torch.cat([dict(found)[member] for member in FUSED.get(fused, [fused])])
        for fused, found in parts.items()
    }


def _is_other(name: str) -> bool:
    first = ".layers.0." in name and "norm" not in name
    return not (first or name.startswith("lm_head"))
