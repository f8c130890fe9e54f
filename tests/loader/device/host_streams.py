"""A double of a device's streams: the device is the CPU, and every call has done its work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from codecllm.loader.device.streams import Event


class _Done:
    """An event whose work is done."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class HostStreams:
    """The same for the CPU, where every call has done its work when it returns.

    With it the tests run the pipeline where there is no GPU (the kernels then run under Triton's
    interpreter). It shows that the right bytes go to the right places; it cannot show that a wait
    is missing.
    """

    def __init__(self) -> None:
        """There is nothing to make."""
        self.device = torch.device("cpu")
        self.copy = self.decode = self.side = None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """See `Streams`."""
        return nullcontext()

    def here(self) -> AbstractContextManager[Any]:
        """See `Streams`."""
        return nullcontext()

    def record(self, stream: Any) -> Event:
        """See `Streams`."""
        return _Done()

    def wait(self, stream: Any, event: Event) -> None:
        """See `Streams`."""

    def follow(self, stream: Any) -> None:
        """See `Streams`."""

    def current(self) -> Any:
        """See `Streams`."""
        return None

    def number(self) -> int:
        """See `Streams`."""
        return 0

    def capturing(self) -> bool:
        """See `Streams`."""
        return False

    def recorded(self, stream: Any, work: Callable[[], object]) -> Callable[[], None] | None:
        """See `Streams`."""

        def replay() -> None:
            work()

        return replay

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """See `Streams`."""

    def pinned(self, size: int) -> torch.Tensor:
        """See `Streams`."""
        return torch.empty(size, dtype=torch.uint8)

    def handle(self, stream: Any) -> int:
        """See `Streams`."""
        return 0

    def synchronize(self) -> None:
        """See `Streams`."""
