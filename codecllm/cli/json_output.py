"""With `--json`: one object on stdout, and nothing else there, whatever libraries print."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any


class JsonOutput:
    """The one object that a command prints.

    Attributes:
        is_printed: whether it was printed, or its first bytes were.
    """

    def __init__(self) -> None:
        """Writes to stdout until it is claimed."""
        self.is_printed = False
        self._descriptor: int | None = None

    def claim_stdout(self) -> None:
        """Keeps stdout for the object: what libraries and child processes print goes to stderr."""
        self._descriptor = os.dup(1)
        os.dup2(2, 1)

    def print(self, value: dict[str, Any]) -> None:
        """Prints an object of JSON values; numbers that JSON does not have become null.

        Raises:
            OSError: stdout cannot be written to.
        """
        text = json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"
        self.is_printed = True
        if self._descriptor is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        view = memoryview(text.encode())
        while view:
            view = view[os.write(self._descriptor, view) :]


output = JsonOutput()
"""Of this process."""


def is_asked_for() -> bool:
    """Whether the command line asks for JSON; for use where it may not be parsed yet."""
    arguments = sys.argv[1:]
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    return "--json" in arguments and not {"--help", "-h", "--version"} & set(arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
