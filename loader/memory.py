"""Memory for decoded tensors on the CPU."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 64
_NUMPY_ALLOCATES_BYTES = 4 << 20
_SLAB_BYTES = 16 << 20
_SLAB_TAKES_BYTES = 64 << 10


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns an uninitialised tensor [shape] on the CPU, aligned to 64 bytes.

    Large ones are numpy's memory: it asks the kernel for huge pages, and the first write to 4 KiB pages costs up to a third of
    a whole decode.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _NUMPY_ALLOCATES_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return _typed(_allocate(size), size, dtype, shape)


class SlabMemory:
    """Gives tensors out; small ones lie together in slabs, which lets the kernel back them by huge pages too.

    The memory of a slab is freed once none of its tensors is left.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab = np.empty(0, np.uint8)

    def empty_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As the function of that name. Every tensor has a storage of its own."""
        size = math.prod(shape) * dtype.itemsize
        if not _SLAB_TAKES_BYTES <= size < _NUMPY_ALLOCATES_BYTES:
            return empty_tensor(shape, dtype)
        rounded = -(-size // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            if self._slab.size < rounded:
                slab = _allocate(_SLAB_BYTES)
                self._slab = slab[-slab.ctypes.data % _ALIGNMENT :]
            memory, self._slab = self._slab[:size], self._slab[rounded:]
        return torch.from_numpy(memory).view(dtype).view(shape)


class RecycledMemory:
    """Gives tensors out, and the memory of those that were dropped again to the next ones of the same size.

    The kernel clears every page that a process gets; a consumer that takes one tensor after another (and copies it to a device,
    say) spares that for all but the first few.
    """

    def __init__(self, keep_bytes: int) -> None:
        """Keeps at most `keep_bytes` of memory that no tensor uses."""
        self._keep_bytes = keep_bytes
        self._free: deque[NDArray[np.uint8]] = deque()

    def empty_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As the function of that name."""
        size = math.prod(shape) * dtype.itemsize
        if size < _NUMPY_ALLOCATES_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        owner = self._take(size)
        memory = np.frombuffer(owner.data, np.uint8)
        # Runs once nothing refers to the memory any more: neither the tensor nor a view of it.
        weakref.finalize(memory, self._give, owner).atexit = False
        return _typed(memory, size, dtype, shape)

    def close(self) -> None:
        """Lets go of all memory that no tensor uses, and of what comes back later."""
        self._keep_bytes = 0
        self._free.clear()

    def _take(self, size: int) -> NDArray[np.uint8]:
        for _ in range(len(self._free)):
            try:
                owner = self._free.popleft()
            except IndexError:
                break
            if owner.nbytes == size + _ALIGNMENT:
                return owner
            self._free.append(owner)
        return _allocate(size)

    def _give(self, owner: NDArray[np.uint8]) -> None:
        self._free.append(owner)
        while self._free and sum(kept.nbytes for kept in tuple(self._free)) > self._keep_bytes:
            self._free.popleft()


def _allocate(size: int) -> NDArray[np.uint8]:
    return np.empty(size + _ALIGNMENT, np.uint8)


def _typed(memory: NDArray[np.uint8], size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory)[start : start + size].view(dtype).view(shape)
