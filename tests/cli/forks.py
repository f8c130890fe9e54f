"""Command lines in forks of one process, which has imported what commands import.

A test whose point is not the process itself saves the seconds of these imports.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any


class Forks:
    """The process: it lives as long as that of the tests."""

    def __init__(self) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.forked", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        atexit.register(self._close)

    def run(self, *arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command line to its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        case = {
            "arguments": [str(one) for one in arguments],
            "cwd": os.fspath(cwd or Path.cwd()),
            "environment": dict(os.environ),
        }
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        done = json.loads(line)
        return subprocess.CompletedProcess(
            case["arguments"], done["code"], done["stdout"], done["stderr"]
        )

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@cache
def _forks() -> Forks:
    return Forks()


def run(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a fork, with this process's environment; see `Forks`."""
    return _forks().run(*arguments, cwd=cwd)
