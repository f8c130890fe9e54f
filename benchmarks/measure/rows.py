"""Shared parts of the benchmarks: settings, rows, interleaved turns, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

OUT = Path("benchmarks/out/run")


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        what: the measured work.
        figure: with its unit.
        against: floor or peer of the same run.
        goal: as text; empty where there is none.
        met: whether it is met; None where there is no goal.
        measured: the numbers behind the figure, by turn.
    """

    what: str
    figure: str
    against: str
    goal: str
    met: bool | None
    measured: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure."""

    workers: int
    repeats: int
    convert_mib: int
    stream_gib: int


def turns(repeats: int, *works: Callable[[], float]) -> list[list[float]]:
    """Runs the works in turns, once to warm up, then `repeats` times; returns seconds by turn."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for durations, work in zip(seconds, works, strict=True):
            durations.append(work())
    return seconds


def ratio(floor: list[float], tool: list[float]) -> float:
    """Returns the median over the turns of floor / tool."""
    return statistics.median(a / b for a, b in zip(floor, tool, strict=True))


def table(rows: list[Row]) -> Table:
    """Returns the rows as a table for the terminal."""
    result = Table(title="Measured against floors and peers of the same run")
    for name in ("what", "figure", "measured against", "goal", ""):
        result.add_column(name)
    for row in rows:
        mark = "" if row.met is None else "met" if row.met else "MISSED"
        result.add_row(row.what, row.figure, row.against, row.goal, mark)
    return result
