"""Where the encoding of stdout lacks a character, an escape stands for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SAYING = """
import sys
import typer
from codecllm.cli import process
from codecllm.cli.app import app
from codecllm.cli.console import stdout

@app.command()
def say() -> None:
    stdout.print("console \\u0394")
    typer.echo("echo \\u0394")

sys.argv = ["codecllm", "say"]
process.main()
"""


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-8"])
def test_a_text_ends_no_command(encoding):
    done = subprocess.run(
        [sys.executable, "-c", _SAYING],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    letter = "\u0394".encode(encoding, "backslashreplace")
    assert done.stdout.split(b"\n") == [b"console " + letter, b"echo " + letter, b""]
