"""`python -m benchmarks.two_trees BEFORE AFTER`: time of loads in two checkouts of codecllm.

Each load runs in a process of its own, from the root of one of the checkouts; the two take turns,
and which of them goes first changes from turn to turn. The figure is the median over the turns of
after / before. Two paths to the same checkout show the noise of the machine.

    git worktree add ../before 7d29966
    python -m benchmarks.two_trees ../before . --turns 20
    python -m benchmarks.two_trees ../before . --turns 20 --cores 2
    python -m benchmarks.two_trees ../before . --turns 20 --millions 1000

Without `--millions` the model is SmolLM2-135M-Instruct (demo/models.py), which is fetched once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

WAYS = ("lossless,dense", "int8,dense", "int8,int8", "lossless,compressed")
_HIDDEN = 2048
_LAYER_MILLIONS = 51
"""Weights of one layer of the synthetic model, in millions."""


def measure(tree: Path, container: Path, resident: str, workers: int) -> float:
    """Returns the seconds of one `from_pretrained` in a new process, run from a checkout.

    Raises:
        RuntimeError: the load failed.
    """
    command = [sys.executable, "-P", "-m", "benchmarks.peak", "load"]
    command += [str(container), resident, str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tree, env=environment
    )
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} in {tree}\n{process.stderr}")
    return float(json.loads(process.stdout.splitlines()[-1])["seconds"])


def compare(
    trees: tuple[Path, Path], container: Path, resident: str, workers: int, turns: int
) -> Iterator[tuple[float, float]]:
    """Yields the seconds of both checkouts, by turn, after one turn that warms the page cache."""
    console = Console(stderr=True)
    for turn in track(range(turns + 1), f"{container.name}, {resident}", console=console):
        order = (0, 1) if turn % 2 else (1, 0)
        seconds = {side: measure(trees[side], container, resident, workers) for side in order}
        if turn:
            yield seconds[0], seconds[1]


def synthetic_model(folder: Path, millions: int) -> Path:
    """Writes a Llama checkpoint in bf16 with about `millions` million weights N(0, 0.02)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=_HIDDEN,
        intermediate_size=4 * _HIDDEN,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=max(1, round(millions / _LAYER_MILLIONS)),
        vocab_size=32_000,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def main(
    before: Annotated[Path, typer.Argument(help="Root of the checkout that is the measure.")],
    after: Annotated[Path, typer.Argument(help="Root of the checkout that is compared with it.")],
    turns: Annotated[int, typer.Option(help="Pairs of loads for each way.")] = 20,
    ways: Annotated[
        list[str] | None, typer.Option("--way", help=f"SCHEME,RESIDENT; default: {WAYS}.")
    ] = None,
    cores: Annotated[int, typer.Option(help="Use this many cores; 0: all.")] = 0,
    workers: Annotated[int, typer.Option(help="Decoding threads; 0: one per core up to 6.")] = 0,
    millions: Annotated[
        int, typer.Option(help="Weights of a synthetic model, in millions; 0: SmolLM2.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--json", help="Write all seconds there, after each turn.")
    ] = None,
) -> None:
    """Compares the time of loads in two checkouts."""
    from codecllm.converter import convert
    from demo.models import smollm2_realistic

    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    workers = workers or min(6, len(os.sched_getaffinity(0)))
    trees = (before.resolve(), after.resolve())
    figures: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="codecllm-two-trees-") as folder:
        source = (
            synthetic_model(Path(folder, "source"), millions) if millions else smollm2_realistic()
        )
        for way in ways or WAYS:
            scheme, resident = way.split(",")
            container = Path(folder, scheme)
            if not container.exists():
                convert(source, container, scheme=scheme)
            figures[way] = []
            for pair in compare(trees, container, resident, workers, turns):
                figures[way].append(pair)
                if out is not None:  # at once: a run takes many minutes, and may be stopped
                    out.write_text(json.dumps(figures))
            Console().print(_table({way: figures[way]}, workers))


def _table(figures: dict[str, list[tuple[float, float]]], workers: int) -> Table:
    table = Table(title=f"Seconds of from_pretrained, {workers} decoding threads, medians")
    for name in ("way", "before", "after", "after / before", "quartiles"):
        table.add_column(name)
    for way, pairs in figures.items():
        ratios = [after / before for before, after in pairs]
        spread = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        table.add_row(
            way,
            f"{statistics.median(before for before, _ in pairs):.3f}",
            f"{statistics.median(after for _, after in pairs):.3f}",
            f"{statistics.median(ratios):.3f}",
            f"{spread[0]:.3f} to {spread[2]:.3f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
