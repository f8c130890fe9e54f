"""Writes a shard as a stream: data first, the header last, into space reserved for it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codecllm.formats.dtypes import DTYPES, DType
from codecllm.formats.errors import LayoutError
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES, TensorEntry, pack_header

# Parts of one call of the system.
_MOST_PARTS = 1024


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that a shard may hold, with upper bounds of its bytes and dimensions.

    Attributes:
        name: name in the shard.
        dtype: element type in the shard.
        max_shape: shape whose decimal digits are at least those of the final shape.
        max_bytes: upper bound of its data, for the room its offsets take.
    """

    name: str
    dtype: DType
    max_shape: tuple[int, ...]
    max_bytes: int


class ShardWriter:
    """A safetensors file under construction.

    The header area is reserved from the plan's upper bounds and padded with spaces, which
    safetensors allows. Nothing of the data is kept in memory. `rollback` forgets the tensors
    written since a `mark`, so that a tensor can be written another way.
    """

    def __init__(
        self,
        path: Path,
        planned: list[PlannedTensor],
        metadata: dict[str, str],
        executor: Executor | None = None,
    ) -> None:
        """Creates `path` (which must not exist) and reserves the header.

        Args:
            path: the file.
            planned: every tensor that the file may hold.
            metadata: strings for the header.
            executor: one thread that writes, in the order of the calls; None writes in the calling
                thread.

        Raises:
            OSError: the file cannot be created.
            LimitError: the header would be too long for the format.
        """
        self._metadata = metadata
        self._entries: list[TensorEntry] = []
        self._names: set[str] = set()
        self._header_bytes = reserved_header_bytes(planned, metadata)
        self._position = 0
        self._executor = executor
        self._pending: deque[Future[None]] = deque()
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by finish() or abort()
        self.path = path

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data written so far."""
        return self._position

    def write(self, *parts: Any, done: Callable[[], None] | None = None) -> None:
        """Appends bytes of the tensor that the next `end_tensor` closes.

        Args:
            parts: bytes-like objects; with an executor they must not change until they are written.
            done: called when they are written, or could not be, in the thread that wrote.

        Raises:
            OSError: writing these or, with an executor, earlier parts failed.
        """
        views = [memoryview(part) for part in parts]
        views = [view.cast("B") for view in views if view.nbytes]
        offset = PREFIX_BYTES + self._header_bytes + self._position
        self._position += sum(map(len, views))
        if self._executor is None:
            self._put(views, offset, done)
            return
        # The error of an earlier write is raised as soon as it is known.
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._put, views, offset, done))

    def end_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        """Names the bytes since the end of the last tensor; returns their number.

        Raises:
            LayoutError: the name was used before.
        """
        start = self._entries[-1].end if self._entries else 0
        if name in self._names:
            raise LayoutError(
                "tensor name is used twice in one shard", file=self.path.name, tensor=name
            )
        self._names.add(name)
        self._entries.append(TensorEntry(name, DTYPES[dtype], shape, start, self._position))
        return self._position - start

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: Any) -> int:
        """Writes a whole small tensor; returns its size in bytes."""
        self.write(data)
        return self.end_tensor(name, dtype, shape)

    def mark(self) -> tuple[int, int]:
        """Returns a point to which `rollback` can return."""
        return len(self._entries), self._position

    def rollback(self, mark: tuple[int, int]) -> None:
        """Forgets everything written since `mark`."""
        count, self._position = mark
        self._names -= {entry.name for entry in self._entries[count:]}
        del self._entries[count:]

    def finish(self) -> tuple[bytes, int]:
        """Writes the header, forces the file to the disk and closes it.

        Returns:
            The bytes before the data (length prefix and header), and the size of the file.

        Raises:
            OSError: writing failed.
        """
        head, size = self.complete()
        self.sync()
        return head, size

    def complete(self) -> tuple[bytes, int]:
        """Writes the header behind all parts, as `finish` does; `sync` has to follow."""
        while self._pending:
            self._pending.popleft().result()
        head = pack_header(self._entries, self._metadata, self._header_bytes)
        # Behind a rollback the file may be longer than its data.
        self._file.truncate(len(head) + self._position)
        self._put([memoryview(head)], 0)
        return head, len(head) + self._position

    def sync(self) -> None:
        """Forces a complete file to the disk and closes it."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _put(
        self, views: list[memoryview], offset: int, done: Callable[[], None] | None = None
    ) -> None:
        """Writes parts one behind the other, in however many pieces the system takes them."""
        try:
            while views:
                count = os.pwritev(self._file.fileno(), views[:_MOST_PARTS], offset)
                offset += count
                while views and count >= len(views[0]):
                    count -= len(views[0])
                    views = views[1:]
                if count:
                    views = [views[0][count:], *views[1:]]
        finally:
            if done is not None:
                done()

    def abort(self) -> None:
        """Closes the file as it is, once nothing is being written; the caller removes it."""
        wait([future for future in self._pending if not future.cancel()])
        self._pending.clear()
        self._file.close()


def reserved_header_bytes(planned: list[PlannedTensor], metadata: dict[str, str]) -> int:
    """Returns the size of a shard's header, padding included, without its length prefix."""
    end = sum(tensor.max_bytes for tensor in planned)
    worst, position = [], 0
    for tensor in planned:
        position = min(end, position + tensor.max_bytes)
        worst.append(TensorEntry(tensor.name, tensor.dtype, tensor.max_shape, position, position))
    # An offset never has more digits than the sum of the bounds before it, so each entry is no
    # longer than in this header.
    return (
        len(pack_header([entry._replace(start=entry.end) for entry in worst], metadata))
        - PREFIX_BYTES
    )
