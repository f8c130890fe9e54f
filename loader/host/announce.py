"""Tells the kernel which bytes of a file will be read next."""

from __future__ import annotations

import os

from codecllm.formats.files import SafeFile
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor

ANNOUNCED_BYTES = 32 << 20
"""How far ahead of the tensor that is read now the kernel is asked to read."""


class Announcer:
    """Asks the kernel to fetch later bytes from the disk while earlier tensors are decoded.

    For one thread.
    """

    def __init__(self) -> None:
        self._windows: dict[str, tuple[int, int]] = {}

    def announce(self, source: PlainTensor | StoredTensor) -> None:
        """Announces a tensor that is read now, and the bytes that follow it in its file."""
        if isinstance(source.file, SafeFile):
            self.announce_bytes(source.file, source.offset, source.offset + _stored_bytes(source))

    def announce_bytes(self, file: SafeFile, offset: int, behind: int) -> None:
        """Announces bytes [offset, behind) of a file, which are read now, and those that follow."""
        if behind == offset or not hasattr(os, "posix_fadvise"):
            return
        name = file.name
        needed_end = behind + ANNOUNCED_BYTES // 2
        begin, end = self._windows.get(name, (0, 0))
        if not begin <= offset <= end:
            # A jump: bytes between the windows are not wanted.
            begin = end = offset
        # In steps of half a window at least: a call for each tensor would cost more than it gains.
        upto = end if end >= needed_end else needed_end + ANNOUNCED_BYTES // 2
        self._windows[name] = begin, upto
        if upto > end:
            with file.opened() as descriptor:
                os.posix_fadvise(descriptor, end, upto - end, os.POSIX_FADV_WILLNEED)


def _stored_bytes(source: PlainTensor | StoredTensor) -> int:
    if isinstance(source, PlainTensor):
        return source.record.source_bytes
    return int(source.table.offsets[-1])
