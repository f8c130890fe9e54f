"""Reads side tensors of a shard: several by one call, and scales as float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.errors import TruncatedError
from codecllm.formats.files import Excerpt, SafeFile
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.float_bits import float32_from_bits
from codecllm.formats.shards.safetensors_header import TensorEntry

SIDES_TOGETHER_BYTES = 4 << 20
"""Most bytes that one call reads of side tensors, with the bytes between them."""


def read_for_tensor(file: SafeFile | Excerpt, offset: int, length: int, tensor: str) -> bytes:
    """Reads bytes that belong to a tensor, which an error names."""
    try:
        return file.read(offset, length)
    except TruncatedError as exc:
        raise exc.located(tensor=tensor) from None


def read_together(
    file: SafeFile | Excerpt, entries: list[TensorEntry], tensor: str
) -> SafeFile | Excerpt:
    """Returns a reader of the bytes of some entries of a tensor.

    They are read by one call where they are small and lie together.
    """
    if isinstance(file, Excerpt):
        return file
    begin, end = min(entry.start for entry in entries), max(entry.end for entry in entries)
    if end - begin > min(SIDES_TOGETHER_BYTES, 2 * sum(entry.bytes for entry in entries)):
        return file
    return Excerpt(file.name, begin, read_for_tensor(file, begin, end - begin, tensor))


def widened_scales(data: bytes, record: Int8Tensor) -> NDArray[np.float32]:
    """Returns the bytes of a side tensor of scales, of rows or of columns, as float32.

    Values are not looked at.
    """
    if record.scale_dtype == "BF16":
        return float32_from_bits(np.frombuffer(data, "<u2"), "BF16")
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)
