"""Scheme `lossless`: elements split into byte planes, exponents apart from mantissas.

A float of n bits is first rotated left by one bit: the sign moves to the end and the exponent
begins at the top. Plane 0 then holds the exponent of bf16 and fp32 (for fp16: exponent and the top
three bits of the mantissa), and the last plane ends in the sign. Integers, bool and 8-bit floats
are not rotated. Bits are moved as integers; no float operation ever touches them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.dtypes import DType
from codecllm.formats.errors import DecodeError


def word_dtype(dtype: DType) -> np.dtype[np.unsignedinteger]:
    """Returns the little-endian unsigned integer type whose size is that of `dtype`."""
    return np.dtype(f"<u{dtype.itemsize}")


def split_planes(elements: NDArray[np.unsignedinteger], dtype: DType) -> list[NDArray[np.uint8]]:
    """Splits elements into planes.

    Args:
        elements: unsigned integers [n] of the element's size, holding its bits.
        dtype: element type, with `dtype.planes` of 1 or more.

    Returns:
        uint8 [n] arrays, plane 0 first.

    Examples:
        >>> from codecllm.formats.dtypes import DTYPES
        >>> elements = np.array([0x3F80, 0xBF80], np.uint16)
        >>> [plane.tolist() for plane in split_planes(elements, DTYPES["BF16"])]
        [[127, 127], [0, 1]]
    """
    # One width for all element sizes keeps the reference obvious.
    words = elements.astype(np.uint64)
    bits = dtype.bits
    if dtype.rotates:
        mask = np.uint64((1 << bits) - 1)
        words = ((words << np.uint64(1)) | (words >> np.uint64(bits - 1))) & mask
    return [(words >> np.uint64(bits - 8 * (k + 1))).astype(np.uint8) for k in range(dtype.planes)]


def join_planes(planes: list[NDArray[np.uint8]], dtype: DType) -> NDArray[np.unsignedinteger]:
    """Returns the bits of elements as little-endian unsigned integers [n]: `split_planes` undone.

    Raises:
        DecodeError: a BOOL element is neither 0 nor 1.

    Examples:
        >>> from codecllm.formats.dtypes import DTYPES
        >>> planes = [np.array([127, 127], np.uint8), np.array([0, 1], np.uint8)]
        >>> [f"{word:04x}" for word in join_planes(planes, DTYPES["BF16"])]
        ['3f80', 'bf80']
    """
    bits = dtype.bits
    words = np.zeros(len(planes[0]), np.uint64)
    for k, plane in enumerate(planes):
        words |= plane.astype(np.uint64) << np.uint64(bits - 8 * (k + 1))
    if dtype.rotates:
        mask = np.uint64((1 << bits) - 1)
        words = ((words >> np.uint64(1)) | (words << np.uint64(bits - 1))) & mask
    # Other bytes are undefined in torch and numpy: two programs could disagree.
    if dtype.name == "BOOL" and (words > 1).any():
        raise DecodeError("a boolean is neither 0 nor 1", got=int(words.max()))
    return words.astype(word_dtype(dtype))
