"""A comparison of two models for people: what differs most, then logits and text."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROWS_SHOWN = 20


def render_comparison(found: dict[str, Any], console: Console) -> None:
    """Prints a comparison: the tensors that differ most, then logits and text."""
    different = [row for row in found["tensors"] if not row["same"]]
    worst = sorted(
        different,
        key=lambda row: -(math.inf if row["relative_error"] is None else row["relative_error"]),
    )
    if worst:
        table = Table(title=f"{len(worst)} of {len(found['tensors'])} tensors differ", box=None)
        for name in ("tensor", "schemes", "differing", "relative error", "worst"):
            table.add_column(
                name, justify="left" if name in ("tensor", "schemes") else "right", overflow="fold"
            )
        for row in worst[:ROWS_SHOWN]:
            table.add_row(escape(row["name"]), " / ".join(row["schemes"]), *_cells(row))
        console.print(table)
    for side in ("a", "b"):
        for name in found[f"only_in_{side}"]:
            console.print(f"only in {escape(found[side])}: {escape(name)}", highlight=False)
    for name in found["files"]:
        console.print(f"differs    {escape(name)}", highlight=False)
    sizes = " and ".join(f"{size:,}" for size in found["stored_bytes"])
    same = len(found["tensors"]) - len(different)
    console.print(
        f"tensors    {same} of {len(found['tensors'])} have the same bits; {sizes} bytes stored",
        highlight=False,
    )
    if "outputs" in found:
        from codecllm.verifier.diagnosis.rendering import text_table

        if found["outputs"].get("prompts"):
            console.print(text_table(found["outputs"]["prompts"], ("A", "B")))
        console.print(f"outputs    {escape(found['outputs']['summary'])}", highlight=False)
    elif "not_run" in found:
        console.print(f"outputs    not compared: {escape(found['not_run'])}", highlight=False)
    console.print(
        "[bold green]the same model, bit for bit[/]" if found["same"] else "[bold]different[/]",
        highlight=False,
    )


def _cells(row: dict[str, Any]) -> list[str]:
    if row["differing"] is None:
        types = f"{row['dtype']} {row['shape']} / {row['other_dtype']} {row['other_shape']}"
        return [types, "", ""]
    figures = (row["relative_error"], row["worst_error"])
    return [f"{row['differing']:,}", *("-" if one is None else f"{one:.3e}" for one in figures)]
