"""A folder of one process, beside what it writes; a killed process's folder goes with the next."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from codecllm.converter.write.signals import signals_wait

PREFIX = ".codecllm-sign-"
_NAME = re.compile(re.escape(PREFIX) + "[a-z0-9_]{8}")  # as tempfile makes them

_FRESH_SECONDS = 60
"""A younger folder stays: its owner may not have locked it yet."""

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """Makes a folder that is removed in any case; a signal waits while it is made or removed.

    SIGKILL leaves it. Folders that killed processes of this user left in `parent` are removed.

    Args:
        parent: where the folder is made.

    Raises:
        OSError: it cannot be made or removed.
    """
    folder: str | None = None
    lock: int | None = None
    try:
        with signals_wait():
            _remove_left(parent)
            folder = tempfile.mkdtemp(dir=parent, prefix=PREFIX)
            lock = os.open(folder, _FLAGS)
            # The system opens it with the end of the process, by whatever that comes.
            with suppress(OSError):  # a file system without locks: then nobody can remove it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Path(folder)
    finally:
        with signals_wait():
            if folder is not None:
                _remove(folder)
            if lock is not None:
                os.close(lock)


def _remove(folder: str) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as exc:
        exc.add_note(f"{folder} could not be removed")
        raise


def _remove_left(parent: Path) -> None:
    with suppress(OSError):  # a folder in the way is no reason to stop
        for name in os.listdir(parent):
            if _NAME.fullmatch(name):
                _remove_if_left(parent / name)


def _remove_if_left(path: Path) -> None:
    """Removes a folder of this user, with one file at most, that no process holds."""
    with suppress(OSError):
        descriptor = os.open(path, _FLAGS)
        try:
            state = os.fstat(descriptor)
            if state.st_uid == os.geteuid() and time.time() - state.st_mtime > _FRESH_SECONDS:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                names = os.listdir(descriptor)
                if len(names) <= 1:
                    for name in names:
                        os.unlink(name, dir_fd=descriptor)  # an error for a folder
                    os.rmdir(path)
        finally:
            os.close(descriptor)
