"""`python -m benchmarks.gpu`: correctness and speed of the GPU path, against the machine's limits.

Needs torch, Triton and the loader's packages. Where nothing can be installed, put a copy beside the
repository and run from its root (`-P` keeps the folder `codecllm` there from hiding the copy):

    python -m pip install --no-deps --no-build-isolation --target /tmp/site .
    PYTHONPATH=/tmp/site:$PWD python -P -m benchmarks.gpu --out /tmp/gpu.json

Without a GPU `TRITON_INTERPRET=1 python -m benchmarks.gpu --rehearse` runs all of it on small sizes
under Triton's interpreter; its times mean nothing.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.device.checks import checks
from benchmarks.device.copies import copies
from benchmarks.device.elements import elements
from benchmarks.device.entropy_coding import decoders, zstd_decoders
from benchmarks.device.machine import Machine, Row
from benchmarks.device.models import generating, loading
from benchmarks.device.products import products, tuning
from benchmarks.device.report import markdown, read_runs

SECTIONS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    "checks": checks,
    "copies": copies,
    "decoders": decoders,
    "zstd": zstd_decoders,
    "elements": elements,
    "products": products,
    "loading": loading,
    "generating": generating,
    "tuning": tuning,
}
_ON_DEMAND = frozenset({"tuning"})


def run_section(name: str, machine: Machine) -> dict[str, Any]:
    """Runs one section; an error stands in its record, beside the rows before it."""
    rows: list[Row] = []
    failure = None
    start = time.perf_counter()
    try:
        for row in SECTIONS[name](machine):
            rows.append(row)
    except Exception:
        failure = traceback.format_exc(limit=-6)
    return {
        "section": name,
        "seconds": time.perf_counter() - start,
        "rows": rows,
        "failure": failure,
    }


def _figure(row: Row) -> str:
    if isinstance(row.value, bool):
        return "right" if row.value else "WRONG"
    return f"{row.value:.3g} {row.unit}"


def _print(console: Console, done: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("section", "what", "figure", "note"):
        table.add_column(column, justify="right" if column == "figure" else "left", overflow="fold")
    for section in done:
        for row in section["rows"]:
            table.add_row(section["section"], row.what, _figure(row), row.note)
    console.print(table)
    for section in done:
        console.print(f"{section['section']}: {section['seconds']:.0f} s")
        if section["failure"]:
            console.print(section["failure"], markup=False, style="red")


def main(
    only: Annotated[
        str, typer.Option(help=f"Sections, with commas between: {', '.join(SECTIONS)}.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Where to write the results as JSON.")] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Print such JSON files as Markdown, and measure nothing."),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="Small sizes; on the CPU where there is no GPU.")
    ] = False,
) -> None:
    """Runs the sections one after another, prints a table and writes JSON."""
    if report:
        typer.echo(markdown(read_runs(report)), nl=False)
        return
    names = only.split(",") if only else [name for name in SECTIONS if name not in _ON_DEMAND]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise typer.BadParameter(f"no section {', '.join(unknown)}")
    if not torch.cuda.is_available() and not rehearse:
        raise typer.BadParameter("there is no GPU here; --rehearse runs under Triton's interpreter")
    machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), rehearse)
    console = Console(width=170)
    results = []
    for name in names:
        results.append(run_section(name, machine))
        if out is not None:
            sections = [
                section | {"rows": [asdict(row) for row in section["rows"]]} for section in results
            ]
            out.write_text(
                json.dumps({"machine": machine.describe(), "sections": sections}, indent=1)
            )
    console.print(machine.describe())
    _print(console, results)
    wrong = any(row.value is False for section in results for row in section["rows"])
    raise typer.Exit(1 if wrong or any(section["failure"] for section in results) else 0)


if __name__ == "__main__":
    typer.run(main)
