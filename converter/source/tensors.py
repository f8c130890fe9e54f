"""One tensor of the source: its entry, and its bytes, read by offset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.dtypes import DType
from codecllm.formats.files import SafeFile
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.shards.safetensors_header import TensorEntry

_STEP_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of the source and where its bytes lie.

    Attributes:
        entry: name, dtype, shape and offsets in its file.
        file: the open file.
    """

    entry: TensorEntry
    file: SafeFile

    @property
    def is_stored(self) -> bool:
        """Whether the file holds the very elements, from `entry.start` on."""
        return True

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.entry.name

    @property
    def dtype(self) -> DType:
        """Its element type."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.entry.shape

    def read_elements(
        self, first: int, last: int, buffer: NDArray[np.uint8] | None = None
    ) -> NDArray[np.unsignedinteger]:
        """Reads elements [first, last) of the row-major order as unsigned integers.

        An integer has the size of an element.

        Only for types of whole bytes.

        Args:
            first: first element.
            last: element behind the last one.
            buffer: uint8, large enough: the result is a view of its head. None allocates.

        Raises:
            TruncatedError: the file became shorter since it was opened.
        """
        size = self.dtype.itemsize
        target = (
            np.empty((last - first) * size, np.uint8)
            if buffer is None
            else buffer[: (last - first) * size]
        )
        self.file.read_into(self.entry.start + first * size, memoryview(target))
        return target.view(word_dtype(self.dtype))

    def read_bytes(self, first: int, last: int) -> bytes:
        """Reads bytes [first, last) of the tensor's data."""
        return self.file.read(self.entry.start + first, last - first)


def same_bytes(a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes; they are read in pieces."""
    if (a.dtype.name, a.shape) != (b.dtype.name, b.shape):
        return False
    size = a.entry.bytes
    return all(
        a.read_bytes(start, min(start + _STEP_BYTES, size))
        == b.read_bytes(start, min(start + _STEP_BYTES, size))
        for start in range(0, size, _STEP_BYTES)
    )
