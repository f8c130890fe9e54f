"""Shards that are open at the same time.

A container may have more of them than a process may have descriptors.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codecllm.formats.errors import ChecksumError
from codecllm.formats.files import SafeFile

OPEN_FILES = 32
"""Most files of a container that stay open without a reader."""


class OpenFiles:
    """The files of one container.

    The least recently used ones are closed, and opened again when they are read.

    Safe to share between threads. A descriptor that a thread reads from is never closed.
    """

    def __init__(self, folder: Path, most: int = OPEN_FILES) -> None:
        """Keeps at most `most` descriptors besides those in use."""
        self._folder = folder
        self._most = most
        self._open: OrderedDict[PooledFile, None] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, name: str) -> PooledFile:
        """Opens a file of the folder; errors as `SafeFile`."""
        file = PooledFile(self._folder, name, self)
        with self._lock:
            self._open[file] = None
            self._close_oldest()
        return file

    def take(self, file: PooledFile) -> int:
        """Returns the descriptor of a file for one read; it stays open until `give` is called."""
        with self._lock:
            if file.descriptor < 0:
                file.reopen()
            # Counted before the oldest files are closed: this one must not be among them.
            file.readers += 1
            self._open[file] = None
            self._open.move_to_end(file)
            self._close_oldest()
            return file.descriptor

    def give(self, file: PooledFile) -> None:
        """Ends a read."""
        with self._lock:
            file.readers -= 1

    def close(self, file: PooledFile) -> None:
        """Closes a file for good."""
        with self._lock:
            file.closed = True
            self._open.pop(file, None)
            file.close_descriptor()

    def _close_oldest(self) -> None:
        excess = len(self._open) - self._most
        if excess <= 0:
            return
        # `take` moves a file to the end, so the least recently used come first.
        idle = [file for file in self._open if not file.readers]
        for file in idle[:excess]:
            file.close_descriptor()
            del self._open[file]


class PooledFile(SafeFile):
    """A file of which `OpenFiles` may close the descriptor between two reads."""

    def __init__(self, folder: Path, name: str, pool: OpenFiles) -> None:
        """Opens the file; errors as `SafeFile`."""
        super().__init__(folder, name)
        self.readers = 0
        self.closed = False
        self._folder = folder
        self._pool = pool

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yields the descriptor, which stays open meanwhile.

        Raises:
            ChecksumError: the file was replaced or written to since it was opened first.
        """
        descriptor = self._pool.take(self)
        try:
            yield descriptor
        finally:
            self._pool.give(self)

    def reopen(self) -> None:
        """Opens the file again; only the pool calls it."""
        if self.closed:
            raise OSError(errno.EBADF, "bad file descriptor: the container is closed", self.name)
        again = SafeFile(self._folder, self.name)
        if again.identity != self.identity:
            again.close()
            raise ChecksumError("file was changed while its container was open", file=self.name)
        self.descriptor = again.descriptor

    def close_descriptor(self) -> None:
        """Closes the descriptor; only the pool calls it."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        """Closes the file for good; a second call does nothing."""
        self._pool.close(self)
