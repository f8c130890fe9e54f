"""Opening files of a source model.

It is the user's own folder, so links are followed wherever they lead.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from codecllm.formats.errors import TruncatedError, UnsafePathError
from codecllm.formats.files import SafeFile


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
    return is_plain and name != "" and not path.is_absolute() and ".." not in path.parts
