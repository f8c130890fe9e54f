"""The error tree of codecllm.

Every failure a caller may meet has one class, and one line that holds every fact.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self


class CodecLLMError(Exception):
    """Root of every error that codecllm raises on purpose.

    Attributes:
        file: name of the file concerned, relative to its folder, or None.
        tensor: name of the tensor concerned, or None.
        chunk: number of the chunk in the tensor's chunk table, or None.
        byte: offset in the file at which the fault was found, or None.
        expected: the expected value, or None.
        got: the value that stands there, or None.
        exit_code: the exit code of the command line for this class.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        chunk: int | None = None,
        byte: int | None = None,
        expected: Any = None,
        got: Any = None,
    ) -> None:
        """Keeps the facts as attributes; `str(error)` puts them into one line."""
        super().__init__(message)
        # `__str__` adds place and values, so the text is kept without them.
        self.message = message
        self.file = file
        self.tensor = tensor
        self.chunk = chunk
        self.byte = byte
        self.expected = expected
        self.got = got

    def located(self, **place: Any) -> Self:
        """Fills in facts that were unknown at the place of the failure, and returns itself.

        Args:
            place: `file`, `tensor`, `chunk` or `byte`; those that are known already stay.
        """
        for name, value in place.items():
            # The innermost place knows best.
            if getattr(self, name) is None:
                setattr(self, name, value)
        return self

    def __str__(self) -> str:
        place = [f"{self.file}:"] if self.file else []
        if self.tensor is not None:
            place.append(
                f"tensor {self.tensor!r}"
                + ("" if self.chunk is not None or self.byte is not None else ":")
            )
        if self.chunk is not None:
            place.append(f"chunk {self.chunk}" + ("" if self.byte is not None else ":"))
        if self.byte is not None:
            place.append(f"at byte {self.byte}:")
        line = " ".join([*place, self.message])
        if self.got is not None:
            line += f", got {self.got}"
        if self.expected is not None:
            line += f", expected {self.expected}"
        return line


class FormatError(CodecLLMError):
    """A container does not follow SPEC.md."""


class NotAContainerError(FormatError):
    """The folder or file is something else: no manifest, a Git LFS pointer, an HTML page, a zip."""


class UnsupportedVersionError(FormatError):
    """The container needs a newer reader.

    Unknown format version, scheme, codec or required feature.
    """

    exit_code = 3


class TruncatedError(FormatError):
    """A file is missing, or shorter than in the manifest."""


class LimitError(FormatError):
    """A size passes a limit of `formats/limits.py`."""


class SchemaError(FormatError):
    """A record has an unknown, missing, repeated or wrongly typed field."""


class LayoutError(FormatError):
    """Offsets, sizes and shapes contradict each other."""


class UnsafePathError(FormatError):
    """A name would lead outside the folder, or the file is not a regular file."""

    exit_code = 5


class ChecksumError(FormatError):
    """Stored bytes differ from their checksum. They were not given to a decoder."""


class DecodeError(FormatError):
    """Stored bytes passed their checksum and still do not decode as the record says."""


class SourceError(CodecLLMError):
    """The source model cannot be converted as it is."""


class UnsafeSourceError(SourceError):
    """The source is unsafe to read.

    It can only be read by executing it (pickle), or its names lead outside its folder.
    """

    exit_code = 5


class NonFiniteWeightError(SourceError):
    """A weight that int8 would have to represent is NaN or infinite."""


class OutputExistsError(CodecLLMError):
    """The output folder holds something that must not be overwritten."""

    exit_code = 2


class UsageError(CodecLLMError):
    """The arguments of a call contradict each other or the facts."""

    exit_code = 2


class HubError(CodecLLMError):
    """A Hub repository could not be reached, found or read."""

    exit_code = 4


class ModelMismatchError(CodecLLMError):
    """The container's tensors and the model class's parameters do not agree.

    No model is returned.
    """


class BaselineError(CodecLLMError):
    """The recorded baseline output cannot be used, or the model's output differs from it."""


class SignatureError(CodecLLMError):
    """A signature is not by the given key, or of other files than the container's."""


class UnsupportedEnvironmentError(CodecLLMError):
    """A needed library is missing or too old on this machine."""

    exit_code = 3


_RAN_OUT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EIO)
# torch and the interpreter have no class of their own for these.
_RAN_OUT_WORDS = ("allocate memory", "start new thread", "failed to map segment")


def machine_error(exc: BaseException) -> BaseException | None:
    """Returns the error to raise where another library's error is the machine's, not the model's.

    Memory, threads, descriptors or the disk ran out. A MemoryError, an error of a device's memory
    or of the system is returned as it is; for others that mean the same, a MemoryError.

    Args:
        exc: what a library raised.

    Returns:
        The error, or None where `exc` may be about the model.
    """
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return exc
    if isinstance(exc, OSError) and exc.errno in _RAN_OUT:
        return exc
    if isinstance(exc, RuntimeError | ImportError) and any(
        words in str(exc) for words in _RAN_OUT_WORDS
    ):
        return MemoryError(one_line(exc))
    return None


@contextmanager
def foreign_errors_as(
    kind: type[CodecLLMError], message: str, *, file: str | None = None, limit: int = 200
) -> Iterator[None]:
    """Raises one of our errors for what another library raises: class and text of it in one line.

    Our own errors pass, and so do those of the machine (`machine_error`).

    Args:
        kind: class of the error.
        message: what could not be done.
        file: name of the file that is to blame, or None.
        limit: most characters of the other error's text.
    """
    try:
        yield
    except CodecLLMError:
        raise
    except Exception as exc:
        raise machine_error(exc) or kind(
            f"{message}: {type(exc).__name__}: {one_line(exc, limit)}", file=file
        ) from exc


def shown(value: object) -> str:
    r"""Returns a caller's value as at most 200 ASCII characters for an error.

    Examples:
        >>> shown("\udcff")
        "'\\udcff'"
        >>> shown(10**5000)
        'a value of type int'
    """
    try:
        return ascii(value)[:200]
    except Exception:  # an integer of thousands of digits; an object's own text may fail in any way
        return f"a value of type {type(value).__name__}"


def one_line(error: object, limit: int = 200) -> str:
    r"""Returns the text of another library's exception as one line of `limit` characters.

    Examples:
        >>> one_line(ValueError("no such  tensor:\n  a.b"))
        'no such tensor: a.b'
        >>> one_line(ValueError("no folder a\udcff"))
        'no folder a\\udcff'
    """
    # A path on the disk need not be UTF-8, and reports of errors are.
    text = str(error).encode("utf-8", "backslashreplace").decode()
    return " ".join(text.split())[:limit]
