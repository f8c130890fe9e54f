"""Opening files of a source model.

It is the user's own folder, so links are followed wherever they lead.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from codecllm.formats.errors import LimitError, TruncatedError, UnsafePathError
from codecllm.formats.files import SafeFile
from codecllm.formats.strict_json import CONFIG_BYTES, parse_json

_NAME_BYTES, _PART_BYTES = 1024, 255


class SourceFile(SafeFile):
    """A regular file of a source's folder, or the regular file to which a link there leads.

    Folders of links into the Hub's cache, into a store of a cluster, or to another disk are common.
    A name still cannot leave the folder: names may come from an index that others wrote.
    """

    def _locate(self, folder: Path, name: str) -> Path:
        if not stays_inside(name):
            raise UnsafePathError("unsafe file name", file=ascii(name))
        path = folder / name
        real = Path(os.path.realpath(path))
        # A broken link is worth its own message: the user sees a file of that name.
        if path.is_symlink() and not real.exists():
            raise TruncatedError("the link leads to no file", file=name, got=str(real))
        return real


def stays_inside(name: str) -> bool:
    """Whether a relative path names something inside its folder, links not considered."""
    path = PurePosixPath(name)
    is_plain = "\0" not in name and "\\" not in name
    # A file system has no longer names, and raises an error of its own for them.
    sizes = [len(part.encode(errors="surrogatepass")) for part in (name, *path.parts)]
    is_short = sizes[0] <= _NAME_BYTES and max(sizes[1:], default=0) <= _PART_BYTES
    if not (is_plain and is_short) or name == "":
        return False
    return not path.is_absolute() and ".." not in path.parts


def read_json(
    folder: Path, name: str, max_bytes: int = CONFIG_BYTES, *, as_python: bool = True
) -> Any:
    """Returns the JSON value of a source's file: what Python's reader takes, within limits.

    Args:
        folder: of the source.
        name: of the file in it.
        max_bytes: refuse a longer file.
        as_python: False refuses repeated keys, `NaN` and the like too.

    Raises:
        TruncatedError: there is no such file.
        LimitError: it is longer than `max_bytes` (nothing is read then), too deep, or holds too
            many values.
        SchemaError: it is not UTF-8, not JSON, or holds a lone surrogate, which no file can.
        UnsafePathError: it is no regular file.
    """
    data = read_bytes(folder, name, max_bytes)
    return parse_json(data, file=name, max_bytes=max_bytes, as_python=as_python)


def read_bytes(folder: Path, name: str, max_bytes: int) -> bytes:
    """Returns the bytes of a source's file.

    Raises:
        TruncatedError: there is no such file.
        LimitError: it is longer than `max_bytes`; nothing is read then.
        UnsafePathError: it is no regular file.
    """
    with SourceFile(folder, name) as file:
        if file.size > max_bytes:
            raise LimitError(
                "file is too long", file=name, got=file.size, expected=f"at most {max_bytes} bytes"
            )
        return file.read(0, file.size)
