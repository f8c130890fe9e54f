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
from rich.text import Text

from codecllm.text import visible


class SafeConsole(Console):
    """A console on which no text acts: controls and hidden characters in it are shown as escapes.

    Markup is for our own texts: those with names of strangers are printed with `markup=False`, or
    escaped.
    """

    def __init__(self, **options: Any) -> None:
        # emoji: `:name:` in the name of a tensor has to stay text.
        super().__init__(highlight=False, soft_wrap=True, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Renders a string of a line or of a table's cell, with hidden characters as escapes."""
        return super().render_str(visible(text), **options)


# A fixed width in pipes: the text must not depend on a terminal that is not there.
stdout = SafeConsole(width=None if sys.stdout.isatty() else 200)
stderr = SafeConsole(stderr=True)


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
        # A column parses markup, and makes its text without `render_str`.
        TextColumn("{task.fields[tensor]}", markup=False),
    )
    # On stderr, and on a terminal only: stdout belongs to the result.
    with Progress(
        *columns, console=stderr, transient=True, disable=not (shown and stderr.is_terminal)
    ) as bar:
        task = bar.add_task(verb, total=None, tensor="")

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, tensor=_on_one_line(name))

        yield advance


def _on_one_line(name: str) -> str:
    return visible(name).replace("\n", "\\n").replace("\t", "\\t")


def print_warnings(warnings: list[str]) -> None:
    """Prints each warning on a line of its own on stderr."""
    for warning in warnings:
        stderr.print(f"warning: {warning}", style="yellow", markup=False)
