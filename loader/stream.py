"""A container as a stream of finished tensors, in file order: reading, checking and decoding overlap, memory is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing

import torch

from codecllm.formats.container import Container
from codecllm.formats.manifest import CodedTensor, RawTensor
from codecllm.loader.memory import RecycledMemory
from codecllm.loader.pool import DecodePool
from codecllm.loader.torch_tensors import announce_reads, file_order, start_filling

JOBS_IN_FLIGHT = 32
"""Jobs queued or done but not yet handed out: about 32 Mi elements."""

KEEP_BYTES = 256 << 20
"""Memory of dropped tensors that is kept for the next ones while the stream lasts."""

Finished = tuple[RawTensor | CodedTensor, torch.Tensor]
_Flight = deque[tuple[Future[None], Finished | None]]


def stream_tensors(container: Container, *, dtype: torch.dtype | None = None, workers: int | None = None) -> Iterator[Finished]:
    """Yields every stored tensor of a container, decoded; aliases are left out.

    Args:
        container: an opened container.
        dtype: dtype of float tensors; None keeps each tensor's source dtype. Integers and booleans keep theirs.
        workers: decoding threads; None takes one per core, or more where the codec gains by it.

    Yields:
        The tensor's record and the tensor, on the CPU. It is the caller's; the stream keeps no reference.

    Raises:
        FormatError: something is damaged. Tensors yielded before are whole and were checked.
        UsageError: `workers` is not positive.
    """
    with DecodePool(container.decoding_threads(workers)) as pool, closing(RecycledMemory(KEEP_BYTES)) as memory:
        flight: _Flight = deque()
        for source in file_order(container):
            is_float = torch_is_float(source.record.dtype)
            filling = start_filling(source, dtype if is_float else None, memory.empty_tensor)
            announce_reads(source)
            for number, job in enumerate(filling.jobs, 1):
                if len(flight) == JOBS_IN_FLIGHT:
                    yield from _settle(flight)
                done = (source.record, filling.tensor) if number == len(filling.jobs) else None
                flight.append((pool.submit(job), done))
            del filling
        while flight:
            yield from _settle(flight)


def torch_is_float(name: str) -> bool:
    """Whether an element type of the container is a float that models compute with (not an 8-bit or smaller one)."""
    return name in ("BF16", "F16", "F32", "F64")


def _settle(flight: _Flight) -> Iterator[Finished]:
    future, done = flight.popleft()
    future.result()
    if done is not None:
        yield done
