"""Files and folders of the output folder, none of them reached through a link."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from codecllm.formats.errors import UnsafePathError
from codecllm.formats.files import fsync_folder, is_safe_name

# A safe name has at most 8 parts (SPEC.md 3).
_MAX_DEPTH = 16


def files_of(folder: Path) -> list[str]:
    """Returns the names of all files and links in a folder and its subfolders; follows no link."""
    return sorted(
        str((Path(parent) / name).relative_to(folder))
        for parent, folders, files in os.walk(folder)
        for name in (*files, *folders)
        if not is_folder(Path(parent) / name)
    )


def folders_of(base: Path, names: Iterable[str]) -> list[Path]:
    """Returns the folders in which the files of `base` stand, outer ones first."""
    return sorted({base / parent for name in names for parent in Path(name).parents})


def refuse_links(base: Path, names: Iterable[str]) -> None:
    """Refuses a link below `base` where a folder of one of the files belongs.

    Raises:
        UnsafePathError: one stands there.
    """
    for folder in folders_of(base, names):
        if folder != base and folder.is_symlink():
            raise UnsafePathError(
                "a link stands where a folder of the container belongs", file=str(folder)
            )


def is_safe_anywhere(name: str) -> bool:
    """Whether the name of a file, as the system gives it, is a safe one.

    It may be one in another locale, where the same bytes were other characters.
    """
    data = os.fsencode(name)
    try:
        return is_safe_name(data.decode())
    except UnicodeDecodeError:
        return is_safe_name(data.decode("latin-1"))


def refuse_deep(folder: Path) -> None:
    """Refuses folders inside one another that are too many to walk through by recursion.

    Raises:
        UnsafePathError: `folder` has them.
    """
    waiting = [(str(folder), 0)]
    while waiting:
        path, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise UnsafePathError("folders are nested too deeply", file=str(folder))
        # One that cannot be read cannot be walked through either.
        with suppress(OSError), os.scandir(path) as entries:
            inner_folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            waiting += [(inner, depth + 1) for inner in inner_folders]


def make_durable_folder(folder: Path) -> None:
    """Makes a folder, and forces its name to the disk, where it is not there."""
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def remove_empty_parents(folder: Path, name: str) -> None:
    """Removes the subfolders in which a file stood, as far as they are empty.

    Removes none where one of them is a link.
    """
    parents = [folder / parent for parent in Path(name).parents[:-1]]
    if not any(parent.is_symlink() for parent in parents):
        for parent in parents:
            with suppress(OSError):
                parent.rmdir()


def is_folder(path: Path) -> bool:
    """Whether a folder itself stands there, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def is_file(folder: Path, name: str) -> bool:
    """Whether a file or a link stands there, in a folder that is no link."""
    path = folder / name
    if not all(is_folder(folder / parent) for parent in Path(name).parents[:-1]):
        return False
    return os.path.lexists(path) and not is_folder(path)


def belongs_to_user(folder: Path) -> bool:
    """Whether a folder and all in it were made by the user of this process; links count as such.

    What somebody else left there may have any content, and a name or a digest beside it says no
    more.
    """
    user = os.geteuid()
    return all(path.lstat().st_uid == user for path in (folder, *folder.rglob("*")))


def remove(path: Path, *, last: str | None = None) -> None:
    """Removes a file, a link or a folder with everything in it, as far as that can be done.

    Of the entries of a folder `last` goes behind all others.
    """
    if is_folder(path):
        if last is not None:
            with suppress(OSError):
                for entry in path.iterdir():
                    if entry.name != last:
                        remove(entry)
        for _ in range(2):  # a file that could not be removed is tried once more
            shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
