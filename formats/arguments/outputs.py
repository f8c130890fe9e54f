"""Files that a user names for a result: what stands there is looked at before the work."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from codecllm.formats.errors import UsageError
from codecllm.formats.manifest.manifest import MANIFEST_NAME


def check_output(path: Path, argument: str, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuses a file to write in whose place something stands that is no earlier result.

    A link is looked at by what it leads to; it is replaced itself where that is a file, or nothing.

    Args:
        path: the file to write.
        argument: its name for the user.
        inputs: files and folders that the work reads; names that are no path are passed over.

    Raises:
        UsageError: a folder, a device or a pipe stands there, one of the inputs, or a file of one;
            the file would lie in a container; or its folder does not exist.
        OSError: it cannot be looked at.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{argument} names a file in a folder that exists", file=str(path))
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{argument} would replace what is no regular file", file=str(path))
    place = Path(os.path.realpath(path.parent)) / path.name
    for folder in place.parents:
        if os.path.isfile(folder / MANIFEST_NAME):
            raise UsageError(
                f"{argument} lies outside of containers, which hold their own files alone",
                file=str(path),
                got=f"inside the container {folder}",
            )
    if status is not None:
        for one in inputs:
            if one is not None and _is_of(path, place, one):
                raise UsageError(f"{argument} would replace what is read", file=str(path))


def _is_of(path: Path, place: Path, source: str | Path) -> bool:
    """Whether a file is `source`, or lies in that folder."""
    if os.path.isdir(source):
        return place.is_relative_to(os.path.realpath(source))
    return os.path.exists(source) and os.path.samefile(path, source)
