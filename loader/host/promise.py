"""A value that one thread gives and another one waits for."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Promise(Generic[T]):
    """Is given a value or an error, once, by one thread; one thread waits for it.

    As `concurrent.futures.Future`, but whoever waits may be interrupted by Ctrl-C at any moment: inside a future's condition
    variable that may leave a lock held, and the thread that has the value then waits for ever.
    """

    def __init__(self) -> None:
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._given = False

    @property
    def given(self) -> bool:
        """Whether there is the value or the error."""
        return self._given

    def give(self, value: T) -> None:
        """Gives the value."""
        self._value = value
        self._end()

    def fail(self, error: BaseException) -> None:
        """Gives the error that prevented the value."""
        self._error = error
        self._end()

    def get(self) -> T:
        """Waits for the value and returns it, or raises the error. After Ctrl-C it may be called again."""
        while not self._given:
            self._bell.get()
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value

    def _end(self) -> None:
        assert not self._given
        self._given = True
        self._bell.put(None)
