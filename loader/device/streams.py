"""Streams, events and pinned memory of a device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from codecllm.loader.kernels.on_device import current_stream

ACCELERATORS = ("cuda", "xpu")
"""Types of devices that the pipeline runs on; ROCm's are called cuda too."""


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether the work before it is done."""

    def synchronize(self) -> None:
        """Waits until it is."""


class Streams(Protocol):
    """The streams of a device, and the calls that the engine makes there.

    Attributes:
        device: where tensors lie.
        copy: the stream that copies from pinned memory.
        decode: the stream that decodes.
        side: a stream without other work, for small copies that the host waits for.
    """

    device: torch.device
    copy: Any
    decode: Any
    side: Any

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Makes `stream` the calling thread's current one, and its device the current one."""

    def here(self) -> AbstractContextManager[Any]:
        """Makes the device the current one; its current stream stays."""

    def record(self, stream: Any) -> Event:
        """Returns an event behind all work queued on `stream` so far."""

    def wait(self, stream: Any, event: Event) -> None:
        """Lets later work of `stream` wait for the event; the host does not."""

    def follow(self, stream: Any) -> None:
        """Lets later work of `stream` wait for all work of the calling thread's current stream."""

    def current(self) -> Any:
        """The calling thread's current stream."""

    def number(self) -> int:
        """A number of the calling thread's current stream; others have other numbers."""

    def capturing(self) -> bool:
        """Whether the calling thread's current stream records a graph instead of working."""

    def recorded(self, stream: Any, work: Callable[[], object]) -> Callable[[], None] | None:
        """Returns a call that queues on `stream` what `work` queues there, by one launch.

        `work` must have run before, so that its kernels are compiled, and what it reads and writes
        must stay where it is. It is called once, and what it queues is noted instead of done.

        Returns:
            None where the device has no such recordings, or could not make this one.
        """

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Keeps the memory of a dropped tensor until earlier work of `stream` is done."""

    def pinned(self, size: int) -> torch.Tensor:
        """Returns uninitialised uint8 [size] on the host, from which copies are asynchronous."""

    def handle(self, stream: Any) -> int:
        """The stream as a number, for libraries in C."""

    def synchronize(self) -> None:
        """Waits for all work of the three streams."""


class DeviceStreams:
    """Streams of one CUDA, ROCm or XPU device: torch spells them alike."""

    def __init__(self, device: torch.device) -> None:
        """Makes the streams."""
        self._module: Any = getattr(torch, device.type)
        index = device.index if device.index is not None else self._module.current_device()
        self.device = torch.device(device.type, index)
        # Copies run beside kernels only on a stream of their own.
        self.copy, self.decode, self.side = (self._module.Stream(self.device) for _ in range(3))
        self._graphs: Any = None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """See `Streams`."""
        context: AbstractContextManager[Any] = self._module.stream(stream)
        return context

    def here(self) -> AbstractContextManager[Any]:
        """See `Streams`."""
        context: AbstractContextManager[Any] = self._module.device(self.device)
        return context

    def record(self, stream: Any) -> Event:
        """See `Streams`."""
        event: Event = stream.record_event()
        return event

    def wait(self, stream: Any, event: Event) -> None:
        """See `Streams`."""
        stream.wait_event(event)

    def follow(self, stream: Any) -> None:
        """See `Streams`."""
        stream.wait_stream(self.current())

    def current(self) -> Any:
        """See `Streams`."""
        return self._module.current_stream(self.device)

    def number(self) -> int:
        """See `Streams`."""
        if self.device.type == "cuda":
            return current_stream(self.device)
        return hash(self.current())

    def capturing(self) -> bool:
        """See `Streams`."""
        if self.device.type != "cuda":
            return False
        if torch.cuda.current_device() == self.device.index:  # a call that every product makes
            return torch.cuda.is_current_stream_capturing()
        with self.here():
            return torch.cuda.is_current_stream_capturing()

    def recorded(self, stream: Any, work: Callable[[], object]) -> Callable[[], None] | None:
        """See `Streams`: a CUDA graph."""
        if self.device.type != "cuda" or torch.version.hip is not None:
            return None
        if self._graphs is None:
            self._graphs = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with self.on(stream):
                # Other threads may allocate memory meanwhile.
                graph.capture_begin(self._graphs, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        except RuntimeError:  # no memory, or a driver that refuses
            return None

        def replay() -> None:
            with self.on(stream):
                graph.replay()

        return replay

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """See `Streams`."""
        tensor.record_stream(stream)

    def pinned(self, size: int) -> torch.Tensor:
        """See `Streams`."""
        # torch gives pinned memory back to a cache of its own, so that later loads get it at once.
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def handle(self, stream: Any) -> int:
        """See `Streams`."""
        return int(stream.cuda_stream)

    def synchronize(self) -> None:
        """See `Streams`."""
        for stream in (self.copy, self.decode, self.side):
            stream.synchronize()


def is_accelerator(device: torch.device) -> bool:
    """Whether the pipeline runs on devices of this type."""
    return device.type in ACCELERATORS
