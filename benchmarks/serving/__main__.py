"""Memory and time of vLLM's start on containers, beside the plain model.

    python -m benchmarks.serving [--rounds 3]

Run in an environment with vLLM (`make test-vllm` makes one). Every start is a process of its own;
the starts are made in turns, and the table shows the least of each figure: other work on the
machine only adds to them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.serving.start import SETTINGS
from codecllm import api
from demo import models

COLUMNS = {
    "start_s": "LLM(), s",
    "first_token_s": "to the first token, s",
    "first_token_cpu_s": "the same, CPU-s",
    "tokens_per_s": "tokens / s",
    "held_mib": "memory, MiB",
    "peak_mib": "peak, MiB",
}


def main(
    rounds: Annotated[int, typer.Option(help="Starts of each kind.", min=1)] = 3,
) -> None:
    """Print time and anonymous memory of vLLM with SmolLM2, plain and from containers."""
    with tempfile.TemporaryDirectory() as work:
        starts = _starts(Path(work))
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
        for _ in range(rounds):
            for name, (model, resident) in starts.items():
                figures[name].append(_measure(model, resident))
    table = Table(title="vLLM with SmolLM2-135M-Instruct, bf16, on the CPU")
    for column in ("model", *COLUMNS.values()):
        table.add_column(column)
    for name, measured in figures.items():
        table.add_row(name, *(_best(measured, key) for key in COLUMNS))
    Console(width=120).print(table)


def _starts(work: Path) -> dict[str, tuple[Path, str]]:
    source = models.smollm2()
    api.convert(source, work / "lossless", scheme="lossless", baseline=False)
    api.convert(source, work / "int8", baseline=False)
    api.convert(source, work / "bits5", bits=5, calibrate="none", baseline=False)
    return {
        "plain safetensors": (source, "plain"),
        "lossless": (work / "lossless", "dense"),
        "int8": (work / "int8", "dense"),
        "int8, codes in memory": (work / "int8", "int8"),
        "--bits 5, codes in memory": (work / "bits5", "int8"),
    }


def _measure(model: Path, resident: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.serving.start", str(model), resident]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **SETTINGS}
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _best(measured: list[dict[str, float]], key: str) -> str:
    values = [figures[key] for figures in measured]
    if key == "tokens_per_s":
        return f"{max(values):.1f}"
    return f"{min(values):.0f}" if key.endswith("mib") else f"{min(values):.1f}"


if __name__ == "__main__":
    typer.run(main)
