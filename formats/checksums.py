"""Checksums: xxh3-64 over stored bytes, sha256 over files and over decoded tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from codecllm.formats.errors import ChecksumError

_READ_BYTES = 4 << 20
_KEEPS_LOCK_BYTES = 1 << 16  # xxhash lets go of the lock beyond


def xxh3(data: Any) -> int:
    """Returns the unseeded xxh3-64 of a bytes-like object as an unsigned integer.

    Examples:
        >>> f"{xxh3(bytes([7]) * 64):016x}"
        '680d3a212fac7cf6'
    """
    return int(xxhash.xxh3_64_intdigest(data))


def xxh3_here(data: memoryview) -> int:
    """Returns `xxh3` of the bytes of a chunk and keeps the interpreter's lock meanwhile.

    For so few bytes, handing the lock over and back costs more than the checksum.
    """
    if len(data) <= _KEEPS_LOCK_BYTES:
        return xxh3(data)
    digest = xxhash.xxh3_64()
    for begin in range(0, len(data), _KEEPS_LOCK_BYTES):
        digest.update(data[begin : begin + _KEEPS_LOCK_BYTES])
    return int(digest.intdigest())


def xxh3_each(parts: Iterable[Any]) -> NDArray[np.uint64]:
    """Returns uint64 [n]: `xxh3` of each of many parts, with little interpreter work between them.

    Examples:
        >>> xxh3_each([b"a", b""]).tolist() == [xxh3(b"a"), xxh3(b"")]
        True
    """
    return np.array(list(map(xxhash.xxh3_64_intdigest, parts)), np.uint64)


def xxh3_hex_each(parts: Iterable[Any]) -> list[str]:
    """Returns `xxh3_hex` of each of many parts, with little interpreter work between them.

    Examples:
        >>> xxh3_hex_each([b"a", b""]) == [xxh3_hex(b"a"), xxh3_hex(b"")]
        True
    """
    return list(map(xxhash.xxh3_64_hexdigest, parts))


def xxh3_hex(data: Any) -> str:
    """Returns the unseeded xxh3-64 of a bytes-like object as 16 hex digits.

    The digits are lower-case, the most significant first.

    Examples:
        >>> xxh3_hex(bytes([7]) * 64)
        '680d3a212fac7cf6'
    """
    return f"{xxh3(data):016x}"


def xxh3_stream() -> Any:
    """Returns a hasher for data that come in parts.

    Examples:
        >>> hasher = xxh3_stream()
        >>> hasher.update(b"two "), hasher.update(b"parts")
        (None, None)
        >>> hasher.hexdigest() == xxh3_hex(b"two parts")
        True
    """
    return xxhash.xxh3_64()


def sha256_hex(data: Any) -> str:
    """Returns the sha256 of a bytes-like object as 64 lower-case hex digits.

    Examples:
        >>> sha256_hex(b"")[:16]
        'e3b0c44298fc1c14'
    """
    return hashlib.sha256(data).hexdigest()


def sha256_of_descriptor(
    descriptor: int, progress: Callable[[int], None] | None = None
) -> tuple[str, int]:
    """Reads an open file from its start to its end.

    Args:
        descriptor: file descriptor of a regular file; its position does not matter and is not
            changed.
        progress: called with the number of bytes after each block read.

    Returns:
        The sha256 as hex digits, and the number of bytes read.

    Raises:
        OSError: reading failed.
    """
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    offset = 0
    # Reads by offset: other threads may use the descriptor.
    while count := os.preadv(descriptor, [view], offset):
        digest.update(view[:count])
        offset += count
        if progress is not None:
            progress(count)
    return digest.hexdigest(), offset


def check_xxh3(data: Any, expected: str, file: str, tensor: str | None, byte: int) -> None:
    """Compares stored bytes (of no tensor: a shard's header) with the manifest.

    Args:
        data: bytes-like.
        expected: their xxh3-64 as 16 hex digits.
        file: where they stand, for the error.
        tensor: likewise.
        byte: likewise.

    Raises:
        ChecksumError: they differ.
    """
    got = xxh3_hex(data)
    if got != expected:
        subject = "header" if tensor is None else "stored bytes"
        raise ChecksumError(
            f"{subject} differ from the manifest: xxh3",
            file=file,
            tensor=tensor,
            byte=byte,
            got=got,
            expected=expected,
        )
