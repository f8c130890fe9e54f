"""Memory for decoded tensors on the CPU."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 64
_OWN_MEMORY_BYTES = 4 << 20
_SLAB_BYTES = 16 << 20
_SLAB_TAKES_BYTES = 64 << 10
_NUMPY_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.bool: np.bool_,
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
}


Allocate = Callable[[int], NDArray[np.uint8]]
"""Returns uninitialised memory, uint8 [size], contiguous and aligned for any element type."""


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns an uninitialised tensor [shape] on the CPU, aligned to 64 bytes."""
    return tensor_over(empty_bytes(math.prod(shape) * dtype.itemsize), shape, dtype)


def empty_bytes(size: int) -> NDArray[np.uint8]:
    """Returns uninitialised memory, uint8 [size], aligned to 64 bytes.

    It is numpy's, which asks the kernel for huge pages where it is large: the first write to 4 KiB
    pages costs up to a third of a whole decode.
    """
    return _aligned(_allocate(size), size)


def tensor_over(
    memory: NDArray[np.uint8], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Returns the tensor [shape] in memory of its size, uint8 and contiguous, as a storage.

    torch's own ways to see a tensor otherwise give the interpreter's lock away each time, so there
    is one such call, or none.
    """
    numpy_dtype = _NUMPY_DTYPES.get(dtype)
    view = torch.from_numpy(memory.view(numpy_dtype or f"i{dtype.itemsize}").reshape(shape))
    return view if numpy_dtype is not None else view.view(dtype)


class SlabMemory:
    """Allocates memory for tensors; small ones lie together in slabs, which get huge pages too.

    The memory of a slab is freed once none of its tensors is left. For one thread.
    """

    def __init__(self) -> None:
        self._slab = np.empty(0, np.uint8)

    def empty_bytes(self, size: int) -> NDArray[np.uint8]:
        """As the function of that name, from a slab where the size fits one."""
        # Tiny tensors stay out: one that outlives the others would keep a whole slab in memory.
        if size >= _OWN_MEMORY_BYTES or size < _SLAB_TAKES_BYTES:
            return empty_bytes(size)
        slot_size = -(-size // _ALIGNMENT) * _ALIGNMENT
        if self._slab.size < slot_size:
            self._slab = _slab()
        memory, self._slab = self._slab[:size], self._slab[slot_size:]
        return memory


class RecycledMemory:
    """Allocates memory for tensors, and gives that of dropped ones to later ones of their size.

    The kernel clears every page that a process gets; a consumer that takes one tensor after another
    (and copies it to a device, say) spares that for all but the first few.
    """

    def __init__(self, keep_bytes: int) -> None:
        """Keeps at most `keep_bytes` of memory that no tensor uses."""
        self._keep_bytes = keep_bytes
        self._free: deque[NDArray[np.uint8]] = deque()

    def empty_bytes(self, size: int) -> NDArray[np.uint8]:
        """As the function of that name."""
        if size < _OWN_MEMORY_BYTES:
            return empty_bytes(size)
        owner = self._take(size)
        memory = np.frombuffer(owner.data, np.uint8)
        # Runs once nothing refers to the memory any more: neither the tensor nor a view of it.
        weakref.finalize(memory, self._give, owner).atexit = False
        return _aligned(memory, size)

    def close(self) -> None:
        """Lets go of all memory that no tensor uses, now and later."""
        self._keep_bytes = 0
        self._free.clear()

    def _take(self, size: int) -> NDArray[np.uint8]:
        for _ in range(len(self._free)):
            try:
                owner = self._free.popleft()
            except IndexError:
                break
            # Exact sizes only: layers repeat, and no memory is wasted on smaller tensors.
            if owner.nbytes == size + _ALIGNMENT:
                return owner
            self._free.append(owner)
        return _allocate(size)

    def _give(self, owner: NDArray[np.uint8]) -> None:
        self._free.append(owner)
        # A tuple: finalizers of other threads may add to the deque meanwhile.
        while self._free and sum(one.nbytes for one in tuple(self._free)) > self._keep_bytes:
            self._free.popleft()


def _slab() -> NDArray[np.uint8]:
    """Returns uint8 [_SLAB_BYTES], whole huge pages where the system has them.

    numpy's memory would lack an eighth of them.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return empty_bytes(_SLAB_BYTES)
    try:
        pages = mmap.mmap(-1, _SLAB_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return empty_bytes(_SLAB_BYTES)  # or numpy's MemoryError
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


def _allocate(size: int) -> NDArray[np.uint8]:
    return np.empty(size + _ALIGNMENT, np.uint8)


def _aligned(memory: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
