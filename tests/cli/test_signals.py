"""Signals that come where Python drops exceptions."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

COMMAND = """
import signal, sys, time
from codecllm.cli import process

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup have it ignored

class Object:
    def __del__(self):
        signal.raise_signal(int(sys.argv[1]))
        for _ in range(100):
            pass

def app(**_):
    for _ in range(2):  # the second one would be ignored, had the first ended the command
        thing = Object()
        del thing
    time.sleep(20)
    print("went on")

process.app = app
process.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_inside_a_destructor_ends_the_command(number):
    command = [sys.executable, "-c", COMMAND, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 128 + number, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: stopped by {number.name}")
    assert "Exception ignored" not in done.stderr


def test_another_error_of_a_destructor_is_shown():
    script = COMMAND.replace("signal.raise_signal(int(sys.argv[1]))", "1 / 0")
    script = script.replace("sleep(20)", "sleep(0)")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert done.stderr.count("ZeroDivisionError") == 2


WRAPPED = """
import signal
from codecllm.cli import process
from codecllm.formats.errors import HubError

def app(**_):
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        try:
            raise RuntimeError("release unlocked lock")
        except RuntimeError as exc:
            raise HubError("the Hub's answer is not understood") from exc

process.app = app
process.main()
"""


def test_a_signal_behind_an_error_of_ours_is_still_a_signal():
    """A signal inside a lock upsets it: the error that comes of it must not hide the signal."""
    command = [sys.executable, "-c", WRAPPED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.startswith("error: stopped by SIGTERM")
