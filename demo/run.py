"""The main job on a real language model: convert, verify, load back, generate; then a table.

`python -m demo.run` runs the command line as a user would and checks every result.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.models import ModelUnavailableError, minilm_bf16, smollm2

OUT = Path("demo/out")
PROMPT = "The capital of France is"
EXPECTED = "The capital of France is Paris."
_console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 100)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the final table."""

    model: str
    scheme: str
    ratio: float
    bits: float
    bound: float
    verdict: str
    text: str


def main() -> None:
    """Runs the demonstration; exits with 1 where a result is not the expected one."""
    began = time.monotonic()
    try:
        language, encoder = smollm2(), minilm_bf16()
    except ModelUnavailableError as exc:
        sys.exit(f"demo: {exc}")
    int8, lossless, honest = (
        OUT / "smollm2-int8",
        OUT / "smollm2-lossless",
        OUT / "minilm-bf16-lossless",
    )
    codecllm("convert", language, int8, "--force")
    codecllm("convert", language, lossless, "--scheme", "lossless", "--force")
    codecllm("convert", encoder, honest, "--scheme", "lossless", "--force")
    baselines = {int8: language, lossless: language, honest: encoder}
    reports = {out: verified(out, source) for out, source in baselines.items()}
    codecllm("generate", int8, PROMPT, "--resident", "int8")
    texts = {out: text_of(out) for out in (int8, lossless)}
    texts[honest] = "-"
    _console.print()
    table = table_of([row(out, reports[out], texts[out]) for out in (int8, lossless, honest)])
    _console.print(table)
    _console.print(
        "SmolLM2 comes from a 4-bit file: few of its values are distinct, and its ratios say "
        "nothing about models\n"
        "that were trained in bf16. MiniLM's weights are originals, rounded to bf16: that row is "
        "the honest one.\n"
        f"Containers: {OUT}/   Time: {time.monotonic() - began:.0f} s"
    )


def codecllm(*arguments: object) -> str:
    """Runs the command line, shows command and output, and returns it; ends the demo on failure."""
    words = [str(argument) for argument in arguments]
    _console.print(f"\n$ codecllm {shlex.join(words)}", style="bold", markup=False)
    process = subprocess.run(
        [sys.executable, "-m", "codecllm", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    _console.print(process.stdout.rstrip(), markup=False)
    if process.returncode != 0:
        sys.exit(f"demo: exit code {process.returncode}")
    return process.stdout


def verified(out: Path, source: Path) -> dict[str, Any]:
    """Verifies a container against its source, as text and as JSON; returns the stages by name."""
    codecllm("verify", out, "--source", source, "--require-baseline")
    command = [sys.executable, "-m", "codecllm", "verify", str(out), "--no-baseline", "--json"]
    report = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    )
    return {stage["name"]: stage for stage in report["stages"]} | {"ok": report["ok"]}


def text_of(out: Path) -> str:
    """Generates from a container and checks the text."""
    text = codecllm("generate", out, PROMPT).strip()
    if not text.startswith(EXPECTED):
        sys.exit(f"demo: {out} generates {text!r}, expected {EXPECTED!r} ...")
    return "Paris."


def row(out: Path, stages: dict[str, Any], text: str) -> Row:
    """Collects the figures of a container."""
    facts = stages["ratio"]["facts"]
    model, _, scheme = out.name.rpartition("-")
    verdict = "ok" if stages["ok"] else "FAILED"
    return Row(
        model,
        scheme,
        facts["ratio"],
        facts["bits_per_weight"],
        facts["entropy_bound_bits_per_weight"],
        verdict,
        text,
    )


def table_of(rows: list[Row]) -> Table:
    """Returns the final table."""
    table = Table(title="What came out")
    for name in ("model", "scheme", "ratio", "bits/weight", "entropy bound", "verify", "generates"):
        table.add_column(name)
    for one in rows:
        numbers = (f"{one.ratio:.3f}x", f"{one.bits:.3f}", f"{one.bound:.3f}")
        table.add_row(one.model, one.scheme, *numbers, one.verdict, one.text)
    return table


if __name__ == "__main__":
    main()
