"""A bound on the memory of what is being hashed and written."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError


class Backlog:
    """Counts the bytes that some threads add and others are done with."""

    def __init__(self, most: int) -> None:
        """Begins with nothing; `most` bytes may be under way at one time."""
        self._most = most
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def add(self, size: int) -> None:
        """Adds bytes; waits for room, unless there are none yet.

        Raises:
            CancelledError: `close` was called, or is called meanwhile.
        """
        with self._changed:
            while self._bytes and self._bytes + size > self._most and not self._closed:
                self._changed.wait()
            if self._closed:
                raise CancelledError
            self._bytes += size

    def done(self, size: int) -> None:
        """Takes off bytes that were added."""
        with self._changed:
            self._bytes -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all waiting: nothing will be done any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
