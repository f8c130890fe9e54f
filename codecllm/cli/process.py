"""The process around a command.

Signals, and one clear line with the right exit code for every failure.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from functools import partial
from typing import Any

from codecllm.cli.app import app
from codecllm.cli.console import stderr
from codecllm.cli.json_output import is_asked_for, output
from codecllm.cli.variables import refused_variable
from codecllm.formats.errors import CodecLLMError, UsageError, machine_error, one_line

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_SECONDS = 0.01


def main() -> None:
    """Runs the command line and exits with its code."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    sys.unraisablehook = partial(_send_again, sys.unraisablehook)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does by itself: texts of models hold characters that an encoding may lack.
        sys.stdout.reconfigure(errors="backslashreplace")
    # By hand: an error may come before typer has parsed the options.
    debug = "--debug" in sys.argv[1:2]
    if not sys.stderr.isatty() or {"--json", "--quiet", "-q"} & set(sys.argv[1:]):
        os.environ.setdefault(
            "HF_HUB_DISABLE_PROGRESS_BARS", "1"
        )  # read when huggingface_hub is imported, which is later
    as_json = is_asked_for()
    if as_json:
        output.claim_stdout()
    try:
        # By itself the library prints a wrong option as a box, on stderr.
        code = app(standalone_mode=not as_json)
        if as_json and code:
            _end(code)
    except SystemExit as exc:
        if not as_json:
            raise
        _end(exc.code)
    except _StopError as exc:
        # 128 + number, as shells report a process that a signal ended.
        _fail(_stopped(exc), 128 + exc.number)
    except (CodecLLMError, OSError, MemoryError) as exc:
        if debug:
            traceback.print_exc()
        # A signal inside a lock of a library becomes its error, and that one of ours.
        stop = _stop_behind(exc) if isinstance(exc, CodecLLMError) else None
        if stop is not None:
            _fail(_stopped(stop), 128 + stop.number)
        message = str(exc) if isinstance(exc, CodecLLMError) else f"{type(exc).__name__}: {exc}"
        _fail(message + _notes(exc), exc.exit_code if isinstance(exc, CodecLLMError) else 4, exc)
    except Exception as exc:
        if debug:
            traceback.print_exc()
        if as_json and hasattr(exc, "format_message"):  # a wrong option
            _fail(exc.format_message(), 2, UsageError(exc.format_message()))
        # A library may have wrapped the signal in an error of its own.
        stop = _stop_behind(exc)
        if stop is not None:
            _fail(_stopped(stop), 128 + stop.number)
        refused = refused_variable(exc)
        if refused is not None:
            _fail(str(refused), refused.exit_code, refused)
        reason = one_line(exc, 300)
        # torch's error of a device without memory is no MemoryError.
        if machine_error(exc) is not None:
            _fail(f"{type(exc).__name__}: {reason}{_notes(exc)}", 4, exc)
        _fail(
            f"unexpected {type(exc).__name__}: {reason} (codecllm --debug ... shows where)", 6, exc
        )


class _StopError(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived.

    Unwinds through every context manager, so that everything cleans up.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: object) -> None:
    """Ends the command once: signals that come while it cleans up are ignored."""
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    raise _StopError(number)


def _send_again(former_hook: Any, unraised: Any) -> None:
    """Sends a signal again that came inside a destructor, where Python drops every exception."""
    if not isinstance(unraised.exc_value, _StopError):
        former_hook(unraised)
        return
    number = unraised.exc_value.number
    signal.signal(number, _stop)
    # Not from here: this hook is called in the same place.
    threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()


def _stopped(stop: _StopError) -> str:
    remains = _notes(stop) or "; nothing half-written was left"
    return f"stopped by {signal.Signals(stop.number).name}{remains}"


def _notes(exc: BaseException | None) -> str:
    """Returns the notes of an exception and its causes.

    The code that cleaned up notes there which files remain.
    """
    notes: list[str] = []
    while exc is not None:
        notes += getattr(exc, "__notes__", [])
        exc = exc.__context__
    return "".join(f"; {note}" for note in dict.fromkeys(notes))


def _stop_behind(exc: BaseException | None) -> _StopError | None:
    """Returns the signal during whose unwinding `exc` was raised.

    One that arrives inside a lock's own code upsets the lock.
    """
    while exc is not None and not isinstance(exc, _StopError):
        exc = exc.__context__
    return exc


def _end(code: Any) -> None:
    """Ends the process with the code of a command, which has printed its object or has failed."""
    if code and not output.is_printed:
        _fail("the command ended without a result", code if isinstance(code, int) else 1)
    sys.exit(code)


def _fail(message: str, code: int, error: BaseException | None = None) -> None:
    """Prints one line (with --json one object on stdout) and exits."""
    if is_asked_for() and not output.is_printed:
        facts: dict[str, Any] = {
            "error": type(error).__name__ if error else "Interrupted",
            "message": message,
        }
        for name in ("file", "tensor", "chunk", "byte", "expected", "got"):
            value = getattr(error, name, None)
            if value is not None:
                facts[name] = value if isinstance(value, (int, str)) else str(value)
        # On stdout, where the result would be: a caller reads one stream.
        try:
            output.print({**facts, "exit_code": code})
        except OSError:  # stdout itself is the fault: a full disk behind it
            stderr.print(f"error: {message}", style="red", markup=False)
    else:
        stderr.print(f"error: {message}", style="red", markup=False)
    sys.exit(code)
