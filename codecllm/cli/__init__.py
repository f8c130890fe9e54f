"""The command line: a failure is one clear line and the exit code of the error's class.

Exit codes: 0 fine, 1 damaged or differs, 2 usage, 3 unsupported version or environment, 4 files or
network, 5 unsafe, 6 unexpected.
"""

from __future__ import annotations

import json
import os
import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command line and exits with its code."""
    _require_streams()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit)
    from codecllm.formats.errors import CodecLLMError

    try:
        # The order of these imports is the order of the commands in --help.
        from codecllm.cli import converting, checking, reading  # noqa: F401, I001
        from codecllm.cli.process import main as run
    except Exception as exc:  # for a variable of the environment, which the import obeys
        from codecllm.cli.variables import refused_variable

        error = exc if isinstance(exc, CodecLLMError) else refused_variable(exc)
        if error is None:
            raise
        _say(type(error).__name__, str(error), error.exit_code)
        sys.exit(error.exit_code)
    run()


def _require_streams() -> None:
    """Ends the process where stdout is closed; a closed stdin or stderr leads nowhere instead."""
    without_stdout = sys.__stdout__ is None
    # A file that is opened takes the lowest free number: what a library prints would end up in it.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.__stderr__ is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    if without_stdout:
        os.write(2, b"error: stdout is closed: there is no place for the result\n")
        sys.exit(4)


def _quit(number: int, frame: object) -> None:
    """Ends the process while modules are imported: there is nothing to clean up yet."""
    _say("Interrupted", f"stopped by {signal.Signals(number).name}", 128 + number)
    # `_exit`: handlers of half-imported modules must not run. 128 + number, as in a shell.
    os._exit(128 + number)


def _say(error: str, message: str, code: int) -> None:
    """Writes a failure before the commands are there: one line, or with --json one object."""
    if "--json" in sys.argv[1:]:
        facts = {"error": error, "message": message, "exit_code": code}
        os.write(1, f"{json.dumps(facts)}\n".encode())
    else:
        os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))
