"""Memory of blocks that is used again: new pages cost as much time as reading the source."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

_LEAST_BYTES = (1 << 16) - 1
_KEPT_BYTES = 8 << 20


class Buffers:
    """Buffers that several threads take, and give back when nothing refers to them any more.

    No more exist than were in use at one time. One that is never given back is freed as any object.
    """

    def __init__(self) -> None:
        """Begins without a buffer."""
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def take(self, size: int) -> NDArray[np.uint8]:
        """Returns a uint8 buffer of `size` bytes or more, with any contents."""
        # Of few sizes, so that they fit again. Pages that nothing writes to take no memory.
        capacity = 1 << max(size - 1, _LEAST_BYTES).bit_length()
        try:
            return self._free[capacity].pop()
        except (KeyError, IndexError):
            return np.empty(capacity, np.uint8)

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Takes back a buffer that `take` returned."""
        # Both calls are atomic under the interpreter's lock.
        self._free.setdefault(buffer.size, []).append(buffer)

    def clear(self) -> None:
        """Frees the buffers that nobody has taken."""
        self._free.clear()


def keep_freed_memory() -> None:
    """Lets the allocator keep what a block frees, where that is glibc; of no effect elsewhere.

    libzstd takes about 3 MiB anew for each block. glibc would give them back to the system at
    once, which costs as much time as reading the source; it learns from a freed piece of memory
    that pieces of its size come again.
    """
    np.empty(_KEPT_BYTES, np.uint8)


class Scratch(threading.local):
    """One thread's memory for what a block needs only while it is encoded."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self._parts: dict[str, NDArray[np.uint8]] = {}

    def reserve(self, name: str, size: int) -> NDArray[np.uint8]:
        """Returns uint8 [size] of the memory called `name`; the next such call gives it again."""
        part = self._parts.get(name)
        if part is None or part.size < size:
            part = self._parts[name] = np.empty(size, np.uint8)
        return part[:size]
