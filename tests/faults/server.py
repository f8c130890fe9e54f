"""Runs command lines of codecllm in forks of a process with all imports, under the shim.

One JSON object per line on stdin: `arguments`, `root`, `fault`, `at`, `log` (a path or null),
`errors` (a path), `cache` (the Hub's, or null). The answer is a JSON object: `code` (negative:
ended by that signal) and `count`, the operations below `root` so far.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any


def main() -> None:
    """Serves until stdin ends."""
    # Imported before the forks: torch and transformers take seconds.
    import codecllm.api
    import codecllm.loader.hf.model_class  # noqa: F401
    from codecllm.cli import main as run

    shim = ctypes.CDLL(None)
    shim.shim_count.restype = ctypes.c_long
    shim.shim_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
    for line in sys.stdin:
        request = json.loads(line)
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            _serve(run, shim, request, theirs)
        os.close(theirs)
        _, status = os.waitpid(child, 0)
        with os.fdopen(ours) as answer:
            count = int(answer.read() or 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "count": count}), flush=True)


def _serve(run: Any, shim: Any, request: dict[str, Any], answer: int) -> None:
    errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    log = -1 if request["log"] is None else os.open(request["log"], os.O_WRONLY | os.O_CREAT)
    code = 0
    sys.argv = ["codecllm", *request["arguments"]]
    if request["cache"] is not None:
        from huggingface_hub import constants

        constants.HF_HUB_CACHE = request["cache"]
    shim.shim_arm(request["root"].encode(), request["fault"], request["at"], log)
    try:
        run()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    finally:
        count = shim.shim_count()
        shim.shim_arm(b"", 0, 0, -1)
        os.write(answer, str(count).encode())
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
