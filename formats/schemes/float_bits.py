"""Conversions between the bits of float types and float32: exact, or of exactly one rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def float32_from_bits(words: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.float32]:
    """Returns the exact float32 values of bit patterns.

    Args:
        words: uint16 (BF16, F16) or uint32 (F32), of any shape.
        dtype: `BF16`, `F16` or `F32`.

    Raises:
        ValueError: another dtype.

    Examples:
        >>> float32_from_bits(np.array([0x3F80, 0xC000, 0x0001], np.uint16), "BF16").tolist()
        [1.0, -2.0, 9.183549615799121e-41]
    """
    if dtype == "BF16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        return words.view(np.float16).astype(np.float32)
    if dtype == "F32":
        return words.view(np.float32)
    raise ValueError(f"no exact float32 values for {dtype}")


def bits_from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[np.unsignedinteger]:
    """Rounds finite float32 values once, ties to even, and returns the bit patterns.

    Overflow gives an infinity, as IEEE 754 rounding does.

    Args:
        values: float32 of any shape, finite.
        dtype: `BF16`, `F16` or `F32`.

    Returns:
        uint16 (BF16, F16) or uint32 (F32) of the same shape.

    Raises:
        ValueError: another dtype.

    Examples:
        >>> words = bits_from_float32(np.array([1.0, 1.00390625, 3.4e38], np.float32), "BF16")
        >>> [f"{word:04x}" for word in words]
        ['3f80', '3f80', '7f80']
    """
    if dtype == "BF16":
        # Half of the last kept bit is added, one less before an even one: ties go to even.
        bits = np.ascontiguousarray(values).view(np.uint32)
        return (
            (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        ).astype(np.uint16)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    if dtype == "F32":
        return np.ascontiguousarray(values).view(np.uint32)
    raise ValueError(f"cannot round to {dtype}")
