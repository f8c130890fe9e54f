"""How far a load is: a callback, or a bar on the terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a tensor that was read, the bytes read so far, and all bytes."""


class Meter:
    """Counts the bytes of the weights that were read, from any thread."""

    def __init__(self, total: int, report: OnProgress | None) -> None:
        """Reports to `report`; None counts silently."""
        self._total = total
        self._report = report
        self._lock = threading.Lock()
        self._done = 0

    def add(self, name: str, size: int) -> None:
        """Adds a tensor of `size` bytes."""
        with self._lock:
            # A tensor that is read under two names or dtypes counts twice.
            self._done = min(self._total, self._done + size)
            if self._report is not None:
                self._report(name, self._done, self._total)


@contextmanager
def metered(progress: bool | OnProgress | None, total: int) -> Iterator[Meter]:
    """Yields the meter of one load.

    Args:
        progress: True draws a bar; False and None draw none; a callback is called instead.
        total: bytes of all weights, as they are in the source.
    """
    if progress is not True:
        yield Meter(total, progress or None)
        return
    columns = (
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        # Names come from others: brackets in them are no markup, controls stand as escapes.
        TextColumn("{task.fields[name]}", markup=False),
    )
    # On stderr, so that output of a program that loads a model stays clean.
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=total, name="")

        def advance(name: str, done: int, _: int) -> None:
            bar.update(task, completed=done, name=ascii(name)[1:-1])

        yield Meter(total, advance)
