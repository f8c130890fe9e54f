"""Converts in a child process whose n-th write, rename or fsync fails in a chosen way; prints how many there were."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_count = 0


def _strike(fault: str, at: int) -> str | None:
    """Counts an operation; at the chosen one kills or raises, or returns `short`."""
    global _count
    _count += 1
    if _count != at:
        return None
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault in ("EIO", "ENOSPC"):
        raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    return fault


def _wrap(name: str, fault: str, at: int) -> None:
    real: Callable[..., Any] = getattr(os, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _strike(fault, at)
        return real(*args, **kwargs)

    setattr(os, name, wrapped)


class _File(io.FileIO):
    """A file whose writes count; a short write takes half of what it was given."""

    fault, at = "", 0

    def write(self, data: Any) -> int:
        if _strike(self.fault, self.at) == "short":
            return super().write(memoryview(data)[: max(1, len(data) // 2)])
        return super().write(data)


def main() -> None:
    """Arguments: source, out, fault, number of the operation (0: none)."""
    import codecllm.formats.shards.shard_writer as shard_writer
    from codecllm.converter import convert

    source, out, fault, at = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    for name in ("replace", "rename", "fsync", "mkdir", "rmdir"):
        _wrap(name, fault, at)
    _File.fault, _File.at = fault, at
    shard_writer.open = lambda path, mode, buffering=0: _File(path, mode.replace("b", ""))  # type: ignore[attr-defined]
    if fault == "stop":
        from codecllm.cli.process import _stop

        signal.signal(signal.SIGTERM, _stop)
    convert(source, out, scheme="lossless", max_shard_bytes=150_000, workers=2)
    print(_count)


if __name__ == "__main__":
    main()
