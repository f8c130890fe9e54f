"""Runs the loader's tests against several versions of transformers; prints a table.

`python -m tests.matrix` makes the environments in `.matrix/` (some 2 GB each); `--versions` picks
some; `--pytest` adds arguments, for example `--pytest=-x`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("5.16.0", "5.17.0", "5.18.0", "5.19.0", "5.21.0", "5.23.0")
TESTS = tuple(
    f"tests/integration/test_{name}.py"
    for name in (
        "loader",
        "plain_loading",
        "compressed",
        "composability",
        "unusual_sources",
        "transformers_hooks",
        "experts",
    )
)
_FREE = ("transformers", "huggingface-hub", "typer", "rich")
"""Packages whose pinned version an older transformers may refuse."""


def main(
    versions: Annotated[
        str, typer.Option(help="Comma-separated versions of transformers.")
    ] = ",".join(VERSIONS),
    pytest: Annotated[str, typer.Option(help="Further arguments of pytest.")] = "",
    folder: Annotated[Path, typer.Option(help="Where the environments are made.")] = ROOT
    / ".matrix",
    jobs: Annotated[int, typer.Option(help="Versions at a time.", min=1)] = 1,
) -> None:
    """Print which tests of the loader pass with which transformers; exit with 1 where one fails."""
    wanted = [version.strip() for version in versions.split(",")]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(
            pool.map(lambda version: run(version, folder / version, pytest.split()), wanted)
        )
    table = Table(title="Loader against transformers")
    for column in ("transformers", "python", "passed", "skipped", "failed"):
        table.add_column(column)
    for version, counts in zip(wanted, results, strict=True):
        python = ".".join(map(str, sys.version_info[:2]))
        table.add_row(
            version, python, *(str(counts.get(name, 0)) for name in ("passed", "skipped", "failed"))
        )
    Console(width=100).print(table)
    raise typer.Exit(
        any(counts.get("failed", 0) or not counts.get("passed", 0) for counts in results)
    )


def run(version: str, environment: Path, arguments: list[str]) -> dict[str, int]:
    """Makes an environment with one version of transformers; returns its tests' counts."""
    python = environment / "bin" / "python"
    if not (environment / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pins = [
            line
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if not line.startswith(_FREE)
        ]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join([*pins, f"transformers=={version}"]))
            constraints.flush()
            for wanted in (["torch"], ["--editable", f"{ROOT}[test]"]):
                install = [
                    str(python),
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--constraint",
                    constraints.name,
                    *wanted,
                ]
                subprocess.run(install, check=True)
        (environment / ".ready").touch()
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "auto",
        *TESTS,
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"--- transformers {version}", *lines, done.stdout.splitlines()[-1], sep="\n", flush=True)
    counts = {
        name: int(count)
        for count, name in re.findall(r"(\d+) (passed|skipped|failed|error)", done.stdout)
    }
    counts["failed"] = counts.get("failed", 0) + counts.pop("error", 0)
    return counts


if __name__ == "__main__":
    typer.run(main)
