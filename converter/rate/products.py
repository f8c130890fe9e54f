"""Sums of products of every two inputs of linear layers, X^T X, in a file instead of memory."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.files import as_path


@dataclass(slots=True)
class _Sum:
    """Of how many inputs a sum is, and how many tokens it has seen."""

    cols: int
    tokens: int = 0


class Sums(ABC):
    """Sums of X^T X by the names of tensors; tensors of layers with the same inputs share one.

    Attributes:
        room: bytes that sums may take while they are added up; None is any number.
    """

    room: int | None = None

    def __init__(self) -> None:
        """Makes the collection, empty."""
        self._sums: list[_Sum] = []
        self._number: dict[str, int] = {}

    def __contains__(self, name: object) -> bool:
        """Whether the inputs of a tensor's layer are known."""
        return name in self._number

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._number)

    def new(self, cols: int) -> int:
        """Makes room for a sum over `cols` inputs, all zero, and returns its number.

        Raises:
            OSError: the disk is full, where the sums lie in a file.
        """
        self._make_room(cols)
        self._sums.append(_Sum(cols))
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

    def settle(self) -> None:  # noqa: B027 - most sums stay where they are
        """Ends the time in which the sums that there are so far are added up."""

    @abstractmethod
    def matrix(self, number: int) -> Any:
        """Returns a sum, float32 [cols, cols], that is changed in place."""

    @abstractmethod
    def _make_room(self, cols: int) -> None:
        """Makes room for the next sum."""


class InputProducts(Sums):
    """Sums in a file.

    The file has no name: its room is free again once this object is gone or the process ends,
    however it ends. It is made where `tempfile` makes files (TMPDIR), 4 bytes for every product.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        """Makes the file, empty, in `folder` or where the system keeps temporary files."""
        super().__init__()
        base = None if folder is None else as_path(folder, "folder")
        self._file, path = tempfile.mkstemp(prefix="codecllm-", dir=base)
        os.unlink(path)
        self._close = weakref.finalize(self, os.close, self._file)
        self._offsets: list[int] = []
        self._end = 0

    def _make_room(self, cols: int) -> None:
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
        self._offsets.append(self._end)
        self._end += size

    def matrix(self, number: int) -> NDArray[np.float32]:
        """Returns a sum, float32 [cols, cols]: a view of the file, which is changed with it."""
        cols = self._sums[number].cols
        mapping = mmap.mmap(self._file, 4 * cols**2, offset=self._offsets[number])
        return np.frombuffer(mapping, np.float32).reshape(cols, cols)

    def close(self) -> None:
        """Gives the room back; nothing else may be called afterwards."""
        self._close()
