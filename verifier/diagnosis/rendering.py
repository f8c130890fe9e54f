"""A diagnosis at a terminal: verdict lines, the worst tensors, and the texts side by side."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codecllm.verifier.rendering import render_report
from codecllm.verifier.report import Report

# The worst are enough at a terminal; the HTML report and `--json` have all.
TENSORS_SHOWN = 10
TEXT_SHOWN = 60


def render_diagnosis(report: Report, console: Console) -> None:
    """Prints the figures behind a diagnosis, then its verdict lines and the paragraph."""
    quantization = report.stage("quantized")
    texts = report.stage("text")
    rows = [
        row
        for row in (quantization.facts.get("tensors", []) if quantization else [])
        if "per_tensor" in row
    ]
    if rows:
        console.print(scale_table(rows))
    for note in quantization.facts.get("channels", []) if quantization else []:
        for kind, channels_of_kind in note.items():
            if kind not in ("name", "not_finite"):
                channels = ", ".join(map(str, channels_of_kind["channels"][:8]))
                scales = f"{kind.replace('_', ' ')} scale in {channels_of_kind['count']} channels"
                console.print(f"{note['name']}: {scales}: {channels}", highlight=False)
    prompts = texts.facts.get("prompts", []) if texts else []
    if prompts:
        console.print(text_table(prompts))
    render_report(report, console)


def scale_table(rows: list[dict[str, Any]]) -> Table:
    """Returns a table of the tensors with the largest error: scales per channel and per tensor."""
    worst = sorted(rows, key=lambda row: -float(row["per_channel"]["relative_error"]))[
        :TENSORS_SHOWN
    ]
    table = Table(
        title=(
            f"One scale per channel | one per tensor "
            f"({len(worst)} of {len(rows)} tensors, largest error first)"
        ),
        box=None,
    )
    table.add_column("tensor", overflow="fold")
    for name in ("error", "codes", "entropy", "bits/w", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in worst:
        a = row["per_channel"]
        b = row["per_tensor"]
        table.add_row(
            escape(row["name"]),
            f"{a['relative_error']:.2e} | {b['relative_error']:.2e}",
            f"{a['codes_in_use']} | {b['codes_in_use']}",
            f"{a['entropy_bits_per_weight']:.2f} | {b['entropy_bits_per_weight']:.2f}",
            f"{a['bits_per_weight']:.2f} | {b['bits_per_weight']:.2f}",
            f"{a['ratio']:.2f} | {b['ratio']:.2f}",
        )
    return table


def text_table(
    prompts: list[dict[str, Any]], sides: tuple[str, str] = ("source", "loaded")
) -> Table:
    """Returns a table of the texts of two models, side by side under the names of `sides`."""
    table = Table(title="Text", box=None)
    for name in ("prompt", *sides, "differs from token"):
        table.add_column(name, overflow="fold")
    for row in prompts:
        first = row["first_differing_token"]
        cells = (_short(row[name]) for name in ("prompt", "source", "loaded"))
        table.add_row(*cells, "same" if first is None else str(first))
    return table


def _short(text: str) -> str:
    # A generated text may hold line breaks and tabs, which would tear the table.
    line = " ".join(text.split())
    return escape(line if len(line) <= TEXT_SHOWN else line[: TEXT_SHOWN - 3] + "...")
