"""Conversions in real processes with one failing operation; see shim.c and server.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FAULTS = (
    "none", "ENOSPC", "EIO", "short", "kill", "SIGTERM", "SIGINT", "SIGHUP", "SIGINT twice", "dead",
)  # fmt: skip
ALL_FAULTS = "CODECLLM_ALL_FAULTS" in os.environ
"""Whether to test every operation; without it a part of them, for the time of the suite."""

OWN_FILES = {"README.md": b"a card", "notes.txt": b"of the user"}


def command(source: Path, out: Path, *more: str) -> list[Any]:
    """Returns the command line of a conversion into two shards, without a baseline."""
    return [*command_with_baseline(source, out), "--no-baseline", *more]


def command_with_baseline(source: Path, out: Path, *more: str) -> list[Any]:
    """Returns the command line of a conversion into two shards that records a baseline."""
    options = ["--scheme", "lossless", "--max-shard-size", "7KB", "--workers", "1"]
    return ["convert", source, out, *options, *more]


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder and its subfolders by their relative paths."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def compile_shim(folder: Path) -> Path:
    """Compiles the shim; skips the test, with the reason, where that cannot be done."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the shim is preloaded with LD_PRELOAD, which this system does not have")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler (cc or gcc) to compile the shim that makes operations fail")
    library = folder / "shim.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(HERE / "shim.c"),
        "-ldl",
    ]
    subprocess.run([*command, "-lpthread"], check=True, capture_output=True)
    return library


@dataclass(frozen=True)
class Ended:
    """The end of a process: exit code (negative: a signal), number of operations, printed text."""

    code: int
    count: int
    text: str


class Server:
    """A process that serves conversions, each in a fork of its own."""

    def __init__(self, library: Path, scratch: Path) -> None:
        """Starts the process."""
        self._scratch = scratch
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=HERE.parents[1], env=environment,
        )  # fmt: skip

    def run(
        self,
        arguments: list[Any],
        root: Path,
        fault: str = "none",
        at: int = 0,
        log: Path | None = None,
        cache: Path | None = None,
    ) -> Ended:
        """Runs a command line; operation `at` below `root` has the fault. `cache`: the Hub's."""
        assert self._process.stdin is not None and self._process.stdout is not None
        errors = self._scratch / "errors"
        request = {
            "arguments": list(map(str, arguments)), "root": str(root), "fault": FAULTS.index(fault),
            "at": at, "log": None if log is None else str(log), "errors": str(errors),
            "cache": None if cache is None else str(cache),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Ended(answer["code"], answer["count"], errors.read_text())

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)
