"""Shared parts of all sections: the device, its sizes, its clock, and rows."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_REPLAYS = 5
_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "nvidia-libnvcomp-cu13",
    "nvidia-libnvcomp-cu12",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        what: the measured work.
        value: the figure, or whether a check held.
        unit: of the figure; empty for a check.
        note: the figure to compare it with.
        measured: further numbers.
    """

    what: str
    value: float | bool
    unit: str = ""
    note: str = ""
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where to measure.

    Attributes:
        device: `cuda`, or `cpu`, where kernels run under Triton's interpreter: a rehearsal whose
            times mean nothing.
        small: use sizes for a rehearsal.
    """

    device: torch.device
    small: bool

    @property
    def rehearses(self) -> bool:
        """Whether there is no GPU."""
        return self.device.type == "cpu"

    def size(self, full: int, small: int) -> int:
        """Returns the size for this run."""
        return small if self.small else full

    def synchronize(self) -> None:
        """Waits for all work of the device."""
        if not self.rehearses:
            torch.cuda.synchronize(self.device)

    def seconds(self, calls: Sequence[Callable[[], object]], *, graph: bool = True) -> float:
        """Returns the median seconds of one call, the calls made one after another.

        On a GPU they are recorded in a CUDA graph, so that the host's time between launches stays
        out; with several calls on different data the caches stay cold. `graph=False` is for calls
        that a graph cannot hold.
        """
        for call in calls:
            call()
        self.synchronize()
        if self.rehearses:
            start = time.perf_counter()
            calls[0]()
            return time.perf_counter() - start
        replay = _recorded(calls) if graph else lambda: [call() for call in calls]
        replay()
        durations = []
        for _ in range(_REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            durations.append(begin.elapsed_time(end) / 1000 / len(calls))
        return statistics.median(durations)

    def describe(self) -> dict[str, Any]:
        """Returns the facts that a reader needs to judge the figures."""
        facts: dict[str, Any] = {"python": platform.python_version(), "command": " ".join(sys.argv)}
        for name in _PACKAGES:
            try:
                facts[name] = version(name)
            except PackageNotFoundError:
                continue
        if self.rehearses:
            return facts | {"device": "none: Triton's interpreter on the CPU"}
        properties = torch.cuda.get_device_properties(self.device)
        return facts | {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
        }


def _recorded(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


Section = Callable[[Machine], Any]
"""Measures and yields rows."""
