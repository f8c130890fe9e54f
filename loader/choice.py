"""The choice of a residency by the memory that is free, for callers who leave it to us."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from codecllm.formats.container import Container
from codecllm.formats.machine import available_memory
from codecllm.formats.manifest.manifest import Manifest
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, RawTensor, TensorRecord
from codecllm.loader.resident.residency import is_by_rows
from codecllm.loader.residents import Chosen
from codecllm.loader.torch_tensors import is_model_float, torch_dtype

CACHE_TOKENS = 4096
"""Tokens of one text whose keys and values must fit beside the weights."""

SPARE_BYTES = 512 << 20
"""Free memory besides weights and cache: activations, buffers of the decoder, the allocator."""


@dataclass(frozen=True, slots=True)
class Residence:
    """The bytes that a container's weights take in memory.

    Attributes:
        dense: as plain weights.
        int8: with the codes of `int8` tensors kept; None where no tensor has codes of 8 bits.
        compressed: with payloads kept, and room for the largest weight, which is decoded alone.
    """

    dense: int
    int8: int | None
    compressed: int


def choose_resident(
    container: Container,
    config: dict[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Chosen:
    """Returns the residency for a container: `dense` if it fits, else one that takes less memory.

    On the CPU that is `int8` for containers that have codes, if it fits, else `compressed`. On a
    GPU it is `packed`. Beside the weights there must be room for keys and values of 4096 tokens.

    Args:
        container: the container.
        config: its config.json.
        dtype: dtype of the weights; None takes the source's.
        device: the GPU onto which the whole model goes; None is the CPU.
    """
    if container.manifest.source.quantization is not None:
        return Chosen("dense", "the quantizer of the source decides how its weights lie in memory")
    sizes = bytes_in_memory(container.manifest, dtype)
    is_cuda = device is not None and device.type == "cuda"
    free_bytes = torch.cuda.mem_get_info(device)[0] if is_cuda else available_memory()
    room = free_bytes - cache_bytes(config, dtype) - SPARE_BYTES
    have = f"{_gib(max(0, room))} are free beside the cache"
    dense = f"dense weights need {_gib(sizes.dense)}, {have}"
    if sizes.dense <= room:
        return Chosen("dense", dense)
    if device is not None:
        return Chosen("packed", dense)
    if sizes.int8 is not None and sizes.int8 <= room:
        return Chosen("int8", f"{dense}, and codes need {_gib(sizes.int8)}")
    if sizes.compressed >= sizes.dense:
        return Chosen("dense", f"{dense}, and no other form is smaller")
    return Chosen("compressed", f"{dense}, and payloads need {_gib(sizes.compressed)}")


def bytes_in_memory(manifest: Manifest, dtype: torch.dtype | None = None) -> Residence:
    """Returns what the weights of a container take in memory; aliases are counted once.

    Args:
        manifest: the container's manifest.
        dtype: dtype of float weights; None takes the source's.
    """
    dense = int8 = compressed = largest = 0
    has_codes = False
    for record in manifest.tensors:
        if isinstance(record, AliasTensor):
            continue
        plain_bytes = record.elements * _itemsize(record, dtype)
        dense += plain_bytes
        stays = not isinstance(record, RawTensor) and is_by_rows(record)
        is_code = stays and isinstance(record, Int8Tensor)
        has_codes |= is_code
        int8 += record.elements + 4 * record.shape[0] if is_code else plain_bytes
        compressed += 0 if stays else plain_bytes
        largest = max(largest, plain_bytes if stays else 0)
    # Payloads of all tensors, those that are not matrices too: a little more than is kept.
    compressed += sum(shard.bytes for shard in manifest.shards) + largest
    return Residence(dense, int8 if has_codes else None, compressed)


def cache_bytes(config: dict[str, Any], dtype: torch.dtype | None = None) -> int:
    """Returns the bytes of keys and values of one text of 4096 tokens, or of the model's longest.

    0 for a model whose config does not say how large they are.
    """
    text = config.get("text_config")
    parts = {**config, **text} if isinstance(text, dict) else config

    def count(name: str, default: int = 0) -> int:
        value = parts.get(name)
        return value if type(value) is int and value > 0 else default

    heads = count("num_attention_heads")
    if not heads:
        return 0
    width = count("head_dim", count("hidden_size") // heads)
    tokens = min(CACHE_TOKENS, count("max_position_embeddings", CACHE_TOKENS))
    itemsize = dtype.itemsize if dtype is not None else 2
    a_token = 2 * count("num_hidden_layers") * count("num_key_value_heads", heads) * width
    return a_token * tokens * itemsize


def _itemsize(record: TensorRecord, dtype: torch.dtype | None) -> int:
    if dtype is not None and is_model_float(record.dtype):
        return dtype.itemsize
    return torch_dtype(record.dtype, record.name).itemsize


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
