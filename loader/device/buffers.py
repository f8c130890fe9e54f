"""Buffers through which stored bytes travel onto a device; each waits for its last use."""

from __future__ import annotations

import torch

from codecllm.loader.device.streams import Event, Streams


class PinnedBuffer:
    """Pinned memory of the host that is read into and copied from."""

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.copied: Event | None = None

    def claim(self, size: int, least: int, streams: Streams) -> torch.Tensor:
        """Waits until the buffer's last copy is done; returns uint8 [size] of it."""
        if self.copied is not None:
            self.copied.synchronize()
        if self.memory is None or self.memory.numel() < size:
            self.memory = None
            self.memory = streams.pinned(max(size, least))
        return self.memory[:size]


class DeviceBuffer:
    """Memory of the device that is copied to and decoded from."""

    def __init__(self) -> None:
        self.memory: torch.Tensor | None = None
        self.decoded: Event | None = None

    def claim(self, size: int, least: int, streams: Streams) -> torch.Tensor:
        """Returns uint8 [size]; the copy stream waits until the last batch there is decoded."""
        if self.decoded is not None:
            streams.wait(streams.copy, self.decoded)
        if self.memory is None or self.memory.numel() < size:
            self.memory = empty_on_device(max(size, least), streams)
            streams.wait(
                streams.copy, streams.record(streams.decode)
            )  # the memory may have been another's there
        return self.memory[:size]


def empty_on_device(size: int, streams: Streams) -> torch.Tensor:
    """Allocates memory that only the decode and copy streams use.

    It is given back behind the decode stream's work.
    """
    with streams.on(streams.decode):
        return torch.empty(size, dtype=torch.uint8, device=streams.device)
