"""The interface of the engines that bring tensors of a container into memory.

    prefetch    tensors that will be taken, in the order in which they will be
    take        the promise of one tensor, prefetched or not
    close       ends the work; tensors that were not finished fail

`host.engine.HostEngine` decodes into the memory of the CPU, `device.engine.DeviceEngine` into that
of a GPU. Both follow one rule: a thread of the caller only puts into and gets from `SimpleQueue`s.
Each of these calls is one step for the interpreter, so Ctrl-C finds nothing half done. Everything
that takes a lock runs in threads of the engine, which Python never interrupts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from codecllm.loader.promise import Awaited

Part = Literal["weight", "codes", "payload"]
"""Part of a stored tensor: its elements; its codes, int8, or int16 where they are wide; its chunks
as they are stored, checked.
"""


@dataclass(frozen=True, slots=True)
class Request:
    """A tensor to bring into memory.

    Attributes:
        name: a stored tensor of the container, no alias.
        part: the part of it.
        dtype: dtype of the elements of a `weight`; None keeps the source's. None for other parts.
        out: memory that receives a `payload`, uint8 [payload bytes]; None allocates it.
    """

    name: str
    part: Part = "weight"
    dtype: torch.dtype | None = None
    out: torch.Tensor | None = field(default=None, compare=False, repr=False)


class Engine(Protocol):
    """Brings tensors of one container into the memory of one device; safe to share by threads."""

    def prefetch(self, requests: Iterable[Request]) -> None:
        """Starts to read tensors that will be taken; the order should be that of the takes."""

    def take(self, request: Request) -> Awaited[torch.Tensor]:
        """Returns the promise of a tensor, complete and checked.

        The engine keeps no reference to the tensor; to a small one of the CPU until those beside it
        are taken. The promise fails with the tensor's FormatError where it is damaged, and with
        RuntimeError where the engine is closed first.
        """

    def close(self) -> None:
        """Ends all work and waits for the engine's threads. May be called again, after Ctrl-C too.

        Finished tensors can still be taken; the promises of all others fail.
        """


def fill(engine: Engine, requests: list[Request]) -> None:
    """Takes tensors into memory of the caller (`Request.out`) and waits for all of them.

    Raises:
        FormatError: a tensor is damaged.
    """
    # All are taken before the first wait, so that the engine never runs out of work.
    engine.prefetch(requests)
    promises = [engine.take(request) for request in requests]
    for promise in promises:
        promise.get()
