"""Runs many command lines in forks of one process, which has imported what they import.

    python -m tests.cli.forked < cases.json
    python -m tests.cli.forked --serve

A case has `arguments`, and may have `patch`, the name of a function that then makes noise on stdout
and raises what `error` names. With `--serve` each line of stdin is a case, with `cwd` and
`environment` too, and its outcome is a line of stdout at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

# What commands import that load models.
_OF_MODELS = (
    "codecllm.loader.hf.model_class",
    "codecllm.loader.hf.plain",
    "codecllm.verifier.model_comparison",
    "codecllm.verifier.diagnosis",
    "codecllm.verifier.evaluation",
)
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
MARKUP = "[red]no[/red] \x1b[31m\nsecond line \ud800"
ERRORS: dict[str, BaseException] = {
    "RuntimeError": RuntimeError(MARKUP),
    "KeyError": KeyError("[bold]"),
    "UnicodeDecodeError": UnicodeDecodeError("utf-8", b"\xff", 0, 1, MARKUP),
    "MemoryError": MemoryError(),
    "OSError": OSError(28, "No space left on device", "/x/[red]y"),
    "RecursionError": RecursionError(MARKUP),
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
}


def failing(error: str) -> Any:
    """Returns a function that prints in every way there is, then fails."""

    def fail(*_: object, **__: object) -> None:
        print(MARKUP.encode("ascii", "replace"), flush=True)
        sys.__stdout__.write("noise\n")
        os.write(1, b"noise\n")
        subprocess.run(["echo", "noise"], check=True)
        if error in SIGNALS:
            signal.raise_signal(signal.Signals[error])
            time.sleep(20)
        raise ERRORS[error]

    return fail


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Runs one command line in a fork; returns its exit code, stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["codecllm", *case["arguments"]]
            if "cwd" in case:
                os.chdir(case["cwd"])
                os.environ.clear()
                os.environ.update(case["environment"])
            if "patch" in case:
                module, _, name = case["patch"].rpartition(".")
                setattr(import_module(module), name, failing(case["error"]))
            code: Any = 99
            try:
                from codecllm.cli import process

                process.main()
                code = 0
            except SystemExit as exc:
                code = exc.code or 0
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code if isinstance(code, int) else 98)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return {"code": status, "stdout": texts[0], "stderr": texts[1]}


def main() -> None:
    """Reads the cases from stdin, and prints their outcomes."""
    serves = sys.argv[1:] == ["--serve"]
    cases = [] if serves else json.load(sys.stdin)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup have it ignored
    from codecllm.cli import checking, converting, process, reading  # noqa: F401

    # Imported by commands when they run: once here instead.
    names = ["codecllm.api", "codecllm.verifier", "codecllm.hub", "codecllm.doctor", "torch"]
    names += _OF_MODELS if serves else []
    names += [case["patch"].rpartition(".")[0] for case in cases if "patch" in case]
    for name in names:
        import_module(name)
    # A fork must have one thread only.
    tasks = len(list(Path("/proc/self/task").iterdir()))
    assert tasks == 1, f"{tasks} threads"
    if serves:
        for line in sys.stdin:
            print(json.dumps(run_case(json.loads(line))), flush=True)
        return
    outcomes = [run_case(case) for case in cases]
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
