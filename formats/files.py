"""Opening and writing files safely.

Regular files inside one folder, exact reads, atomic replacement.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from codecllm.formats.errors import (
    LimitError,
    NotAContainerError,
    TruncatedError,
    UnsafePathError,
    UsageError,
    shown,
)

_PART = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}"
_PLAIN_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_MAX_NAME_BYTES, _MAX_PART_BYTES, _MAX_PARTS = 1024, 255, 8
# Characters that no name may hold. These are control characters, those that Windows reserves, and
# invisible ones.
_REFUSED_CHARACTERS = re.compile(
    '[\\x00-\\x1f\\x7f-\\x9f"*:<>?\\\\|\u200b-\u200f\u2028-\u202e'
    "\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_SNIFF_BYTES = 64


class SafeFile:
    """A regular file inside `folder`, opened once for reading by offset.

    Reads use pread on one descriptor, so threads may share the object and a file that is replaced
    meanwhile is not mixed in.

    Raises:
        UnsafePathError: the name has an unsafe form, or leads outside the folder, or is not a
            regular file.
        TruncatedError: there is no such file.
        OSError: the file cannot be opened.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """Opens `folder / name`; see the class for its errors."""
        self.name = name
        self.path = self._locate(folder, name)
        # NOFOLLOW: a link that appears behind `_locate` is refused. NONBLOCK: a FIFO must not hang.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self.descriptor = os.open(self.path, flags)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise TruncatedError("file is missing", file=name) from exc
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.ENXIO):
                raise UnsafePathError("not a regular file", file=name) from exc
            raise
        # Of the descriptor: the path may lead elsewhere by now.
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self.descriptor)
            raise UnsafePathError("not a regular file", file=name)
        self.size = status.st_size
        self.identity = file_identity(status)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Yields the descriptor, which stays open meanwhile."""
        yield self.descriptor

    def _locate(self, folder: Path, name: str) -> Path:
        """Returns the path to open, links resolved."""
        return safe_path(folder, name)

    def read(self, offset: int, length: int) -> bytes:
        """Reads exactly `length` bytes at `offset`.

        Raises:
            TruncatedError: the file ends before.
        """
        with self.opened() as descriptor:
            # One call is enough nearly always; `read_into` copes with short reads.
            data = os.pread(descriptor, length, offset)
        if len(data) == length:
            return data
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills `target` (bytes, writable) from `offset`.

        Raises TruncatedError where the file ends before.
        """
        done_bytes, length = 0, len(target)
        with self.opened() as descriptor:
            while done_bytes < length:
                count = os.preadv(descriptor, [target[done_bytes:]], offset + done_bytes)
                if count == 0:
                    raise TruncatedError(
                        "file ends early",
                        file=self.name,
                        byte=offset + done_bytes,
                        expected=offset + length,
                    )
                done_bytes += count

    def unchanged(self) -> bool:
        """Whether the path still leads to the file that was opened, and nothing was written to it.

        The time of the last change tells too: unlike that of the last modification no program can
        put it back.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return file_identity(status) == self.identity

    def close(self) -> None:
        """Closes the descriptor; a second call does nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> SafeFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """Returns the numbers of which one changes when a file is replaced or written to."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Bytes of a file that were read together.

    `read` gives parts of them by their place in the file, as `SafeFile.read`.
    """

    name: str
    begin: int
    data: bytes

    def read(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes from `offset` of the file on; they must lie inside the excerpt."""
        at = offset - self.begin
        if not 0 <= at <= at + length <= len(self.data):
            raise ValueError(f"{self.name}: [{offset}, {offset + length}) was not read")
        return self.data[at : at + length]

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills `target` (bytes, writable) from `offset`; it must lie inside the excerpt."""
        target[:] = self.read(offset, len(target))


def as_path(value: object, argument: str) -> Path:
    """Returns the path that a caller gave as the argument of that name.

    Raises:
        UsageError: it is neither text nor a path of text, it is empty, or it holds a NUL or other
            characters that no path can have.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
        # An empty text would be the current folder: mostly a variable that is not set.
        if isinstance(text, str) and text and b"\0" not in os.fsencode(text):
            return Path(text)
    except (TypeError, ValueError):  # no path; a lone surrogate
        pass
    raise UsageError(f"{argument} is no path", got=shown(value), expected="text without NUL")


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file name, or one inside one subfolder, of portable ASCII characters."""
    return _PLAIN_NAME.fullmatch(name) is not None and ".." not in name and not name.endswith(".")


def is_safe_name(name: str) -> bool:
    """Tells whether a name is a relative path within its folder, the same on every system.

    See SPEC.md 3.
    """
    if is_plain_name(name):
        return True
    if _REFUSED_CHARACTERS.search(name) or unicodedata.normalize("NFC", name) != name:
        return False
    parts = name.split("/")
    if len(name.encode()) > _MAX_NAME_BYTES or len(parts) > _MAX_PARTS:
        return False
    # Some systems read compatibility characters, such as a full-width dot, as the plain ones.
    folded_parts = unicodedata.normalize("NFKC", name).split("/")
    return len(folded_parts) == len(parts) and all(
        _is_safe_part(part) for part in (*parts, *folded_parts)
    )


def _is_safe_part(part: str) -> bool:
    has_safe_ends = not part.startswith((".", " ", "-", "~")) and not part.endswith((".", " "))
    return bool(part) and len(part.encode()) <= _MAX_PART_BYTES and has_safe_ends


def safe_path(folder: Path, name: str) -> Path:
    """Returns the real path of `folder / name`.

    It must be inside the folder, or in the blobs of the same Hub cache entry.

    A Hub cache keeps `<repository>/snapshots/<commit>/<name>` as a link into `<repository>/blobs/`;
    no other link is followed.

    Raises:
        UnsafePathError: anything else.
    """
    if not is_safe_name(name):
        raise UnsafePathError("unsafe file name", file=ascii(name))
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(root / name))
    # A path that equals its real path has no link in it.
    if real == root / name:
        return real
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and real.parent == blobs and not blobs.is_symlink():
        return real
    raise UnsafePathError("a symbolic link leads outside the folder", file=name, got=str(real))


def describe_missing(folder: Path, wanted: str) -> str:
    """Says why `folder` is none, in words for an error.

    `wanted` describes the folder, for the case that a file stands there.
    """
    return f"a file; {wanted}" if folder.exists() else "no such folder"


LFS_BEGIN = b"version https://git-lfs"
"""The first bytes of a Git LFS pointer."""


def describe_foreign(head: bytes) -> str | None:
    """Names the kind of a file by its first bytes, for files that often replace a shard."""
    if head.startswith(LFS_BEGIN):
        return "a Git LFS pointer (the real file was not downloaded: run 'git lfs pull')"
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive (perhaps a PyTorch pickle)"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith(b"\x80\x02") or head.startswith(b"\x80\x04"):
        return "a Python pickle"
    return None


def refuse_foreign(file: SafeFile) -> None:
    """Raises NotAContainerError where the file's first bytes are known to be something else."""
    looks_like = describe_foreign(file.read(0, min(_SNIFF_BYTES, file.size)))
    if looks_like is not None:
        raise NotAContainerError(f"this is {looks_like}", file=file.name)


def read_file(folder: Path, name: str, max_bytes: int) -> bytes:
    """Returns all bytes of the regular file `folder / name`.

    Raises:
        LimitError: it is longer than `max_bytes`; nothing was read.
        UnsafePathError, TruncatedError, OSError: as `SafeFile`.
    """
    with SafeFile(folder, name) as file:
        if file.size > max_bytes:
            raise LimitError(
                "file is too long", file=name, got=file.size, expected=f"<= {max_bytes}"
            )
        return file.read(0, file.size)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it holds either the old or the new bytes, both whole.

    `path` and the partial file beside it, `<name>.partial`, are replaced whatever they are; a link
    there is not followed.

    Raises:
        OSError: a folder stands in the place of one of them, or writing failed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        # Inside: a signal may come as soon as the file is there.
        with os.fdopen(_create(partial), "wb") as file:
            file.write(data)
            file.flush()
            # Before the rename, which could otherwise reach the disk before the bytes.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    fsync_folder(path.parent)


def _create(path: Path) -> int:
    """Makes a new file for writing, in the place of any other; returns its descriptor."""
    # EXCL: neither a link nor a pipe that stands there is opened.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        path.unlink()
        return os.open(path, flags, 0o666)


def fsync_folder(folder: Path) -> None:
    """Forces the folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
