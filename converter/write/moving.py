"""The list of files that a commit moves.

Each has a mark by which it is known again: whoever made the list did not know the other files of
the folder, and none of them is taken for a file of the commit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from codecllm.converter.write.folders import is_file
from codecllm.formats import limits
from codecllm.formats.checksums import xxh3_hex
from codecllm.formats.errors import SchemaError, UnsafePathError
from codecllm.formats.files import SafeFile, read_file, write_atomically
from codecllm.formats.manifest.manifest import MANIFEST_NAME

# More files than a container can have, and the length of a list with as many of them.
_MAX_MOVED, _MAX_LIST_BYTES = limits.TENSORS + limits.FILES, 16 << 20
_END_BYTES = 1 << 16  # a mark of whole files would read the model twice
_MARK_DIGITS = 16


class _FoundFile(SafeFile):
    """A file whose name the system gave, maybe in another locale; its folders are no links."""

    def _locate(self, folder: Path, name: str) -> Path:
        return folder / name


def mark_of(folder: Path, name: str) -> str:
    """Returns the mark of a regular file: 16 hex digits of its length, beginning and end."""
    with _FoundFile(folder, name) as file:
        size = min(file.size, _END_BYTES)
        ends = file.read(0, size) + file.read(file.size - size, size)
        return xxh3_hex(file.size.to_bytes(8, "little") + ends)


def write_list(path: Path, folder: Path, names: Iterable[str]) -> None:
    """Writes the list of files of `folder` that will be moved, in their order."""
    lines = [f"{mark_of(folder, name)} {name}" for name in names]
    write_atomically(path, os.fsencode("\n".join(lines)))


def read_list(path: Path) -> dict[str, str]:
    """Returns the names of a list, in their order, and their marks.

    Raises:
        FormatError: it is no such list.
    """
    data = read_file(path.parent, path.name, _MAX_LIST_BYTES)
    marks = {}
    for line in os.fsdecode(data).split("\n", _MAX_MOVED):
        mark, space, name = line.partition(" ")
        if not space or len(mark) != _MARK_DIGITS or name in marks:
            raise SchemaError("not a list of files with their marks", got=ascii(line[:80]))
        marks[name] = mark
    return marks


def refuse_files_of_others(
    out: Path, staged: Path, marks: dict[str, str], old_names: Iterable[str]
) -> None:
    """Refuses to undo a commit where a file would be moved, or replaced, that is none of it.

    Args:
        out: the output folder.
        staged: where its files were written.
        marks: names that were to be moved into `out`, and their marks.
        old_names: names that are to be moved back into `out`.

    Raises:
        UnsafePathError: there is such a file.
    """
    for name, mark in marks.items():
        is_there = is_file(out, name) and not os.path.lexists(staged / name)
        if is_there and mark_of(out, name) != mark:
            raise UnsafePathError("another file than the one that was moved", file=name)
    for name in old_names:
        is_moved = name in marks and not os.path.lexists(staged / name)
        if os.path.lexists(out / name) and not is_moved:
            raise UnsafePathError("a file stands where one of the old container was", file=name)


def advice(out: Path, old: Path) -> str:
    """Says what to do with a staging folder that no conversion of this version left.

    Args:
        out: the output folder.
        old: the folder of staging where a commit keeps the container that it replaces.
    """
    if is_file(out, MANIFEST_NAME) or not is_file(old, MANIFEST_NAME):
        return "remove this folder"
    # A kill of an older version, maybe, whose lists have no marks to go by.
    return (
        "but files of a replaced container may lie there and nowhere else: move all that is in "
        f"{old.parent.name}/{old.name} to {out}, over what is there, verify it, and only then "
        "remove this folder"
    )
