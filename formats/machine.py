"""Cores and memory of this machine."""

from __future__ import annotations

import gc
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

MAX_WORKERS = 1024
"""Most worker threads of one load or conversion: more only take threads from the system."""


class _Pauses:
    """The pauses of the search for reference cycles that last, in any thread.

    Attributes:
        lasting: an object for each; adding and removing are one step for the interpreter.
        stopped: whether the search ran before the first of them.
    """

    lasting: ClassVar[set[object]] = set()
    stopped = False


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pauses the search for reference cycles while many objects that stay are made.

    Each search looks at all of them again: half of the time of reading ten thousand records. Pauses
    of several threads may overlap; the search goes on with the end of the last one, if it ran
    before.
    """
    # No lock, which Ctrl-C might leave held: where two threads meet here, the search may go on
    # early, and it always goes on.
    pause = object()
    try:
        _Pauses.lasting.add(pause)
        if gc.isenabled():
            _Pauses.stopped = True
            gc.disable()
        yield
    finally:
        _Pauses.lasting.discard(pause)
        if not _Pauses.lasting and _Pauses.stopped:
            _Pauses.stopped = False
            gc.enable()


def cores() -> int:
    """Returns how many cores this process may use, 1 or more."""
    # Containers and batch systems give a process fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def threads_of(workers: int | None) -> int:
    """Returns how many threads an argument `workers` asks for; None is one per core.

    Args:
        workers: None, or an integer from 1 to `MAX_WORKERS`, of numpy too.
    """
    return cores() if workers is None else operator.index(workers)


def available_memory() -> int:
    """Returns the bytes that can be allocated without swapping.

    All memory where that is unknown.
    """
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        # No /proc outside Linux.
        pass
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
