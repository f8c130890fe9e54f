"""Small files that a user names: regular files of a bounded length, or an error that says so."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from codecllm.formats.errors import UsageError

TEXT_BYTES = 256 << 20
"""Length of a text that the user gives; a hundred times the texts by which models are compared."""


def check_input(path: Path, what: str, max_bytes: int) -> None:
    """Refuses what is no regular file before a library opens it: a pipe or a device never ends.

    Args:
        path: the file; links are followed.
        what: it is, for the error.
        max_bytes: longest that is taken.

    Raises:
        UsageError: it is no regular file, or longer.
        OSError: it cannot be looked at.
    """
    _check(os.stat(path), path, what, max_bytes)


def read_user_text(path: Path) -> str:
    """Returns the text of a file that the user names: UTF-8, at most TEXT_BYTES.

    Raises:
        UsageError: it cannot be read, is no regular file, is longer, or is not UTF-8.
    """
    try:
        # NONBLOCK: a FIFO that nobody writes to would make the call wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check(os.fstat(descriptor), path, "the text", TEXT_BYTES)
            with os.fdopen(descriptor, encoding="utf-8", closefd=False) as file:
                return file.read(TEXT_BYTES)
        finally:
            os.close(descriptor)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise UsageError(f"the text cannot be read ({reason})", file=str(path)) from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"the text is not UTF-8 ({exc.reason})", file=str(path)) from exc


def _check(status: os.stat_result, path: Path, what: str, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{what} is no regular file", file=str(path))
    if status.st_size > max_bytes:
        raise UsageError(
            f"{what} is too long",
            file=str(path),
            got=status.st_size,
            expected=f"at most {max_bytes} bytes",
        )
