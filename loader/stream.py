"""A container as a stream of finished tensors, in file order: reading, checking and decoding overlap, memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import torch

from codecllm.formats.container import Container
from codecllm.formats.manifest.records import AliasTensor, CodedTensor, RawTensor
from codecllm.loader.host.memory import RecycledMemory
from codecllm.loader.host.pool import DecodePool
from codecllm.loader.host.read_ahead import ReadAhead, Request
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.torch_tensors import (
    Announcer,
    Filling,
    file_order,
    is_model_float,
    start_filling,
    torch_dtype,
)

AHEAD_BYTES = 64 << 20
"""Bytes of tensors that are made ahead; the next tensor always is."""

KEEP_BYTES = 256 << 20
"""Memory of dropped tensors that is kept for the next ones while the stream lasts."""


def stream_tensors(
    container: Container | str | Path,
    *,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
) -> Iterator[tuple[RawTensor | CodedTensor, torch.Tensor]]:
    """Yields every stored tensor of a container, decoded; aliases are left out.

    Args:
        container: a container's folder, or an opened container, which stays open.
        dtype: dtype of float tensors; None keeps each tensor's source dtype. Integers and booleans keep theirs.
        workers: decoding threads; None takes one per core up to six, and 16 for codec `rans`.

    Yields:
        The tensor's record and the tensor, on the CPU. It is the caller's; the stream keeps no reference.

    Raises:
        FormatError: something is damaged, or the folder is no container. Tensors yielded before are whole and were checked.
        UsageError: `workers` is not positive.
    """
    with (
        _opened(container) as opened,
        DecodePool(decoding_threads(opened, workers)) as pool,
        closing(RecycledMemory(KEEP_BYTES)) as memory,
        ReadAhead(pool, AHEAD_BYTES) as ahead,
    ):
        announce = Announcer()
        requests = {
            name: _request(opened, name, dtype, memory, announce) for name in file_order(opened)
        }
        ahead.expect(requests.values())
        for name in list(requests):
            record = opened.records[name]
            assert not isinstance(record, AliasTensor)
            yield record, ahead.result(ahead.take(requests.pop(name)))


def _opened(container: Container | str | Path) -> AbstractContextManager[Container]:
    if isinstance(container, Container):
        return nullcontext(container)
    return Container(container)


def _request(
    container: Container,
    name: str,
    dtype: torch.dtype | None,
    memory: RecycledMemory,
    announce: Announcer,
) -> Request:
    record = container.records[name]
    wanted = (
        dtype
        if dtype is not None and is_model_float(record.dtype)
        else torch_dtype(record.dtype, name)
    )

    def start() -> Filling:
        source = container.tensor(name)
        announce(source)
        return start_filling(source, wanted, memory.empty_bytes)

    return Request(name, record.elements * wanted.itemsize, start)
