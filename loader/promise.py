"""A value that one thread gives and other threads wait for."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_LONGEST_WAIT_SECONDS = 0.1


class Awaited(Protocol[T_co]):
    """A value that another thread will give."""

    def error(self) -> BaseException | None:
        """Waits for the value or the error; returns the error, or None where there is none."""

    def get(self) -> T_co:
        """Waits for the value and returns it, or raises the error. May be called again."""


class Promise(Generic[T]):
    """Receives one value or one error; the first one stays. Any number of threads may wait for it.

    It has no lock. Ctrl-C may end a wait at any moment, and then neither the thread that gives nor
    other threads that wait notice it; inside the condition variable of a
    `concurrent.futures.Future` it may leave a lock held, and the giving thread waits for ever.

    Examples:
        >>> promise = Promise[int]()
        >>> promise.give(3)
        >>> promise.fail(ValueError("too late"))
        >>> promise.get()
        3
    """

    def __init__(self) -> None:
        self._outcomes: list[tuple[T | None, BaseException | None]] = []
        self._bells: list[SimpleQueue[None]] = []

    @property
    def done(self) -> bool:
        """Whether it has the value or the error."""
        return bool(self._outcomes)

    def give(self, value: T) -> None:
        """Sets the value and wakes the threads that wait."""
        self._settle(value, None)

    def fail(self, error: BaseException) -> None:
        """Sets the error that prevented the value and wakes the threads that wait."""
        self._settle(None, error)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the value or the error, at most `timeout` seconds; returns `done`."""
        if self._outcomes:
            return True
        end = math.inf if timeout is None else time.monotonic() + timeout
        bell: SimpleQueue[None] = SimpleQueue()
        self._bells.append(bell)
        # Checked first: the outcome may have come before the bell could be seen.
        while not self._outcomes and (left := end - time.monotonic()) > 0:
            # Ctrl-C that comes as a wait in C begins does not end it: Python looks again soon.
            with suppress(Empty):
                bell.get(timeout=min(left, _LONGEST_WAIT_SECONDS))
        return bool(self._outcomes)

    def error(self) -> BaseException | None:
        """Waits for the value or the error; returns the error, or None where there is none."""
        self.wait()
        _, error = self._outcomes[0]
        return error

    def get(self) -> T:
        """Waits for the value and returns it, or raises the error. May be called again."""
        error = self.error()
        if error is not None:
            raise error
        value, _ = self._outcomes[0]
        return value  # type: ignore[return-value]  # T itself may be None

    def _settle(self, value: T | None, error: BaseException | None) -> None:
        if not self._outcomes:
            # Two threads may come here at once: both append, and the first entry counts.
            self._outcomes.append((value, error))
        for bell in self._bells:
            bell.put(None)
