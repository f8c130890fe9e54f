"""Sums of products of every two inputs of linear layers, X^T X, in a file instead of memory."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class _Sum:
    """Where a sum lies, of how many inputs, and how many tokens it has seen."""

    offset: int
    cols: int
    tokens: int = 0


class InputProducts:
    """Sums of X^T X by the names of tensors; tensors of layers with the same inputs share one.

    The file has no name: its room is free again once this object is gone or the process ends,
    however it ends. It is made where `tempfile` makes files (TMPDIR), 4 bytes for every product.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """Makes the file, empty, in `folder` or where the system keeps temporary files."""
        self._file, path = tempfile.mkstemp(prefix="codecllm-", dir=folder)
        os.unlink(path)
        self._close = weakref.finalize(self, os.close, self._file)
        self._sums: list[_Sum] = []
        self._number: dict[str, int] = {}
        self._end = 0

    def __contains__(self, name: object) -> bool:
        """Whether the inputs of a tensor's layer are known."""
        return name in self._number

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._number)

    def new(self, cols: int) -> int:
        """Makes room for a sum over `cols` inputs, all zero, and returns its number.

        Raises:
            OSError: the disk is full.
        """
        # A mapping has to begin at a multiple of the granularity.
        size = -(-4 * cols * cols // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            # Takes the room now: on a full disk a write into a mapped hole would end in SIGBUS.
            os.posix_fallocate(self._file, self._end, size)
        except OSError as exc:
            text = (
                f"no room for the sums of products of inputs, {self._end + size:,} bytes and "
                f"more ({exc.strerror})"
            )
            raise OSError(exc.errno, text, tempfile.gettempdir()) from exc
        self._sums.append(_Sum(self._end, cols))
        self._end += size
        return len(self._sums) - 1

    def assign(self, name: str, number: int) -> None:
        """Says which sum is that of a tensor's inputs."""
        self._number[name] = number

    def drop(self, name: str) -> None:
        """Forgets a tensor."""
        self._number.pop(name, None)

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self._number)

    def number(self, name: str) -> int:
        """Returns the number of a tensor's sum."""
        return self._number[name]

    def count(self, number: int, tokens: int) -> None:
        """Notes that a sum has seen more tokens."""
        self._sums[number].tokens += tokens

    def tokens(self, number: int) -> int:
        """Returns how many tokens a sum has seen."""
        return self._sums[number].tokens

    def matrix(self, number: int) -> NDArray[np.float32]:
        """Returns a sum, float32 [cols, cols]: a view of the file, which is changed with it."""
        total = self._sums[number]
        mapping = mmap.mmap(self._file, 4 * total.cols**2, offset=total.offset)
        return np.frombuffer(mapping, np.float32).reshape(total.cols, total.cols)

    def close(self) -> None:
        """Gives the room back; nothing else may be called afterwards."""
        self._close()
