"""Digests over parts that come in order, computed by worker threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class Hasher(Protocol):
    """The part of `hashlib`'s and `xxhash`'s objects that is used here."""

    def update(self, data: Any, /) -> None:
        """Adds a bytes-like object."""

    def hexdigest(self) -> str:
        """Returns the digest of all that was added."""


class OrderedDigest:
    """Hashes parts in the order in which they are added, in threads of an executor.

    The digests of several tensors run side by side; that of one cannot.
    """

    def __init__(self, executor: Executor, *hashers: Hasher) -> None:
        """Keeps the hashers; each gets every part."""
        self._executor = executor
        self._hashers = hashers
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._running = False

    def update(self, data: Any, done: Callable[[], None] | None = None) -> None:
        """Adds a bytes-like object, which must not change; `done` is called once it is hashed."""

        def work() -> None:
            try:
                for hasher in self._hashers:
                    hasher.update(data)
            finally:
                if done is not None:
                    done()

        self._put(work)

    def finish(self, make: Callable[..., Result]) -> Future[Result]:
        """Returns the future result of `make`, called with the hex digests behind all parts."""
        future: Future[Result] = Future()

        def work() -> None:
            try:
                future.set_result(make(*(hasher.hexdigest() for hasher in self._hashers)))
            except BaseException as exc:  # raised where the result is taken
                future.set_exception(exc)

        self._put(work)
        return future

    def _put(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.append(work)
            starts, self._running = not self._running, True
        # A single task drains the queue: parts stay in order, and no thread blocks for its turn.
        if starts:
            self._executor.submit(self._run)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                work = self._waiting.popleft()
            work()
