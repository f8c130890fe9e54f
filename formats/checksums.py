"""Checksums: xxh3-64 over what is stored, sha256 over files and over decoded tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from codecllm.formats.errors import ChecksumError

_READ_BYTES = 1 << 20
_KEEPS_LOCK_BYTES = 1 << 16  # xxhash lets go of the lock beyond


def xxh3(data: Any) -> int:
    """Returns the unseeded xxh3-64 of a bytes-like object as an unsigned integer."""
    return int(xxhash.xxh3_64_intdigest(data))


def xxh3_here(data: memoryview) -> int:
    """As `xxh3`, but keeps the interpreter's lock: for a chunk, handing it over and back costs more than the sum."""
    if len(data) <= _KEEPS_LOCK_BYTES:
        return xxh3(data)
    digest = xxhash.xxh3_64()
    for begin in range(0, len(data), _KEEPS_LOCK_BYTES):
        digest.update(data[begin : begin + _KEEPS_LOCK_BYTES])
    return int(digest.intdigest())


def xxh3_each(parts: Iterable[Any]) -> NDArray[np.uint64]:
    """Returns uint64 [n]: `xxh3` of each of many parts, with hardly any work of the interpreter between two."""
    return np.array(list(map(xxhash.xxh3_64_intdigest, parts)), np.uint64)


def xxh3_hex(data: Any) -> str:
    """Returns the unseeded xxh3-64 of a bytes-like object as 16 lower-case hex digits, most significant first."""
    return f"{xxh3(data):016x}"


def xxh3_stream() -> Any:
    """Returns a hasher for data that come in parts: `update(data)`, then `hexdigest()`, which is what `xxh3_hex` gives."""
    return xxhash.xxh3_64()


def sha256_hex(data: Any) -> str:
    """Returns the sha256 of a bytes-like object as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_descriptor(
    descriptor: int, progress: Callable[[int], None] | None = None
) -> tuple[str, int]:
    """Reads an open file from its start to its end.

    Args:
        descriptor: file descriptor of a regular file; its position does not matter and is not changed.
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
        what = "header" if tensor is None else "stored bytes"
        raise ChecksumError(
            f"{what} differ from the manifest: xxh3",
            file=file,
            tensor=tensor,
            byte=byte,
            got=got,
            expected=expected,
        )
