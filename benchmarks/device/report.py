"""Turns the JSON of `python -m benchmarks.gpu` into Markdown: the tables of docs/gpu.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_TITLES = {
    "copies": "What the machine can do",
    "decoders": "`rans`: symbols decoded",
    "zstd": "zstd by nvCOMP: symbols decoded",
    "elements": "Elements made from symbols: bytes read and written",
    "products": "Products with int8 weights, against a dense bf16 layer",
    "loading": "Loading",
    "generating": "Tokens a second, one sequence, greedy",
}


def read_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Returns one run out of several files: of a section that stands in more than one, the last."""
    report: dict[str, Any] = {"machine": {}, "sections": {}}
    for path in paths:
        document = json.loads(path.read_text())
        report["machine"] = document["machine"]
        report["sections"] |= {section["section"]: section for section in document["sections"]}
    return report


def markdown(run: dict[str, Any]) -> str:
    """Returns a line about the machine, one about the checks, and a table per section."""
    machine = {
        key: value for key, value in run["machine"].items() if key not in ("command", "device")
    }
    versions = ", ".join(f"{key} {value}" for key, value in machine.items())
    parts = [f"{run['machine'].get('device', 'unknown device')}: {versions}."]
    checks = run["sections"].get("checks", {}).get("rows", [])
    if checks:
        right = sum(row["value"] is True for row in checks)
        parts.append(f"Checks against the references: {right} of {len(checks)} right.")
    for name, title in _TITLES.items():
        rows = run["sections"].get(name, {}).get("rows", [])
        if rows:
            cells = ((row["what"], _figure(row), row["note"]) for row in rows)
            parts.append(f"### {title}\n\n{_table(('what', 'figure', 'note'), cells)}")
    return "\n\n".join(parts) + "\n"


def _figure(row: dict[str, Any]) -> str:
    value = row["value"]
    if isinstance(value, bool):
        return "right" if value else "failed"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {row['unit']}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", "---:", *["---"] * (len(head) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
