"""A container as a stream of finished tensors, in the order of its files.

Reading, checking and decoding overlap; memory is bounded.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path

import torch

from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.container import Container
from codecllm.formats.manifest.records import AliasTensor, CodedTensor, RawTensor
from codecllm.loader.device.engines import DeviceEngines
from codecllm.loader.engine import Engine, Request
from codecllm.loader.host.engine import HostEngine
from codecllm.loader.host.memory import RecycledMemory
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.reader import CPU
from codecllm.loader.torch_tensors import check_dtype, file_order, is_model_float, torch_dtype

AHEAD_BYTES = 64 << 20
"""Bytes of tensors that are decoded ahead; the next tensor always is."""

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
        dtype: dtype of float tensors; None keeps each tensor's source dtype. Integers and booleans
            keep theirs.
        workers: decoding threads; None takes one per core, without the native core at most six.

    Yields:
        The tensor's record and the tensor, on the CPU. It is the caller's; the stream keeps no
        reference.

    Raises:
        FormatError: a tensor is damaged, or the folder is no container. Tensors yielded before are
            whole and were checked.
        UsageError: `workers` is not positive, or `dtype` none of float tensors.
    """
    if dtype is not None:
        check_dtype(dtype)
    check_arguments(workers=workers)
    with _opened(container) as source:
        # In the order of the files: each is read from its beginning to its end.
        requests = [_request(source, name, dtype) for name in file_order(source)]
        with closing(stream_requests(source, requests, workers=workers)) as tensors:
            for request, tensor in zip(requests, tensors, strict=True):
                record = source.records[request.name]
                assert not isinstance(record, AliasTensor)
                yield record, tensor
                del tensor  # the caller may drop it while it waits for the next one


def stream_requests(
    container: Container,
    requests: Sequence[Request],
    *,
    workers: int | None = None,
    device: torch.device = CPU,
) -> Generator[torch.Tensor]:
    """Yields the tensors of requests, in their order; that of the files is the fastest.

    Args:
        container: an opened container, which stays open.
        requests: stored tensors or their codes, each at most once.
        workers: see `stream_tensors`.
        device: where they are decoded and yielded: the CPU, or a GPU.

    Raises:
        FormatError, UsageError: see `stream_tensors`.
    """
    threads = decoding_threads(workers)
    with ExitStack() as stack:
        engine: Engine
        devices = stack.enter_context(DeviceEngines(container, threads))
        if devices.serves(device):
            engine = devices.engine(device)
        else:
            memory = stack.enter_context(closing(RecycledMemory(KEEP_BYTES)))
            engine = stack.enter_context(
                closing(
                    HostEngine(container, threads, allocate=memory.empty_bytes, budget=AHEAD_BYTES)
                )
            )
        engine.prefetch(requests)
        for request in requests:
            yield engine.take(request).get()


def _opened(container: Container | str | Path) -> AbstractContextManager[Container]:
    if isinstance(container, Container):
        return nullcontext(container)
    return Container(container)


def _request(container: Container, name: str, dtype: torch.dtype | None) -> Request:
    record = container.records[name]
    if dtype is None or not is_model_float(record.dtype):
        dtype = torch_dtype(record.dtype, name)
    return Request(name, "weight", dtype)
