"""Small tensors of a block that are alike, decoded by one call; the reference is one by one."""

from __future__ import annotations

import torch

from codecllm.formats.alike import join_alike, layout_key
from codecllm.formats.codecs import native
from codecllm.formats.container import Container
from codecllm.formats.files import Excerpt
from codecllm.formats.manifest.records import CodedTensor
from codecllm.formats.tile_run import CODES, decode_natively
from codecllm.loader.engine import Request
from codecllm.loader.host.filling import decoded_dtype
from codecllm.loader.host.memory import empty_bytes, tensor_over
from codecllm.loader.torch_tensors import TORCH_DTYPES

_FEWEST = 4
"""Joining fewer costs more than reading each."""


def decode_alike(
    container: Container, shard: int, excerpt: Excerpt, requests: list[Request]
) -> dict[Request, torch.Tensor]:
    """Decodes those tensors of a block that are alike, as `filling.plan_tensor` and its jobs do.

    Args:
        container: where they are stored.
        shard: number of their shard.
        excerpt: the block.
        requests: weights or codes of tensors that lie in it.

    Returns:
        The tensors. One that is not there has to be decoded by itself: it is like few others, or
        one of these is damaged.
    """
    if native.core is None:
        return {}
    groups: dict[object, list[tuple[Request, CodedTensor]]] = {}
    for request in requests:
        record = container.stored_record(request.name)
        key = layout_key(record)
        if key is not None:
            assert isinstance(record, CodedTensor)
            groups.setdefault((key, request.part, request.dtype), []).append((request, record))
    tensors: dict[Request, torch.Tensor] = {}
    for group in groups.values():
        if len(group) >= _FEWEST:
            tensors.update(_decode_group(container, shard, excerpt, group))
    return tensors


def _decode_group(
    container: Container, shard: int, excerpt: Excerpt, group: list[tuple[Request, CodedTensor]]
) -> dict[Request, torch.Tensor]:
    """Returns the tensors of one layout; none where one of them may be damaged."""
    _, header = container.shard(shard)
    joined = join_alike([record for _, record in group], header, excerpt)
    if joined is None:
        return {}
    source, slots = joined
    request, record = group[0]
    grid = source.table.grid
    target = CODES if request.part == "codes" else decoded_dtype(record, request.dtype)
    dtype = torch.int8 if request.part == "codes" else TORCH_DTYPES.get(target)
    if dtype is None:
        return {}
    memory = empty_bytes(grid.rows * grid.cols * dtype.itemsize)
    words = memory.view(f"<u{dtype.itemsize}").reshape(grid.rows, grid.cols)
    if not decode_natively(source, range(len(group)), words, target, slots):
        return {}
    together = tensor_over(memory, (len(group), *record.shape), dtype)
    if request.dtype is not None:
        together = together.to(request.dtype)
    # Copies: a tensor that stays must not keep those beside it in memory.
    return {one: part.clone() for (one, _), part in zip(group, together.unbind(), strict=True)}
