"""Switches log messages and progress bars of transformers off for a while, for all threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from transformers.utils import logging as transformers_logging

T = TypeVar("T")


class _SharedSetting(Generic[T]):
    """A setting of the whole process that several threads may change at the same time.

    The first block that enters saves the value, and the last one that leaves puts it back. Blocks
    that each saved the value for themselves would leave it changed where they overlap.
    """

    def __init__(self, read: Callable[[], T], write: Callable[[T], None]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._blocks = 0
        self._saved: list[T] = []

    @contextmanager
    def changed_to(self, value: T) -> Iterator[None]:
        """Holds the setting at `value` inside the block."""
        with self._lock:
            if self._blocks == 0:
                self._saved = [self._read()]
                self._write(value)
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    self._write(self._saved.pop())


def _show_progress_bars(show: bool) -> None:
    switch = transformers_logging.enable_progress_bar
    if not show:
        switch = transformers_logging.disable_progress_bar
    switch()


# One object for each setting of the process, so that blocks of all threads count together.
_verbosity = _SharedSetting(transformers_logging.get_verbosity, transformers_logging.set_verbosity)
_progress_bars = _SharedSetting(transformers_logging.is_progress_bar_enabled, _show_progress_bars)


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps transformers from logging warnings inside the block."""
    with _verbosity.changed_to(transformers_logging.CRITICAL):
        yield


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing progress bars inside the block."""
    with _progress_bars.changed_to(False):
        yield
