"""The output of commands: two streams, warnings, the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(verb: str, shown: bool, unit: str = "bytes") -> Iterator[Any]:
    """Yields a callback (name, done, total) that draws a bar on stderr, if that is a terminal."""
    counts = (
        (DownloadColumn(), TransferSpeedColumn())
        if unit == "bytes"
        else (MofNCompleteColumn(), TextColumn(unit))
    )
    columns = (
        TextColumn(verb),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}"),
    )
    with Progress(
        *columns, console=stderr, transient=True, disable=not (shown and stderr.is_terminal)
    ) as bar:
        task = bar.add_task(verb, total=None, tensor="")

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, tensor=name)

        yield advance


def print_warnings(warnings: list[str]) -> None:
    """Prints each warning on a line of its own on stderr."""
    for warning in warnings:
        stderr.print(f"warning: {warning}", style="yellow", markup=False)
