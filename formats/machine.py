"""Cores and memory of this machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from codecllm.formats.errors import UsageError

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


def check_workers(workers: object) -> None:
    """Refuses what is no number of worker threads: a whole number from 1 to `MAX_WORKERS`.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(workers, int) or isinstance(workers, bool):
        raise UsageError("workers must be a number", got=repr(workers)[:200])
    if workers < 1:
        raise UsageError("workers must be 1 or more", got=workers)
    if workers > MAX_WORKERS:
        raise UsageError("too many workers", expected=f"at most {MAX_WORKERS}")


def cores() -> int:
    """Returns how many cores this process may use, 1 or more."""
    # Containers and batch systems give a process fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


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
