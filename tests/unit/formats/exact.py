"""IEEE 754 rounding in exact rational arithmetic, slow and obvious.

The fast paths must equal them.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

_KINDS = {"F32": (24, -126, 127), "BF16": (8, -126, 127), "F16": (11, -14, 15)}
"""Precision in bits, smallest and largest exponent of a normal number."""


def rounded(value: Fraction, dtype: str) -> Fraction | None:
    """Returns the number of `dtype` nearest to `value`, ties to even.

    None stands for an infinity.
    """
    precision, lowest, highest = _KINDS[dtype]
    if value == 0:
        return value
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    result = round(value / quantum) * quantum  # Python rounds a Fraction half to even
    return result if abs(result) < Fraction(2) ** (highest + 1) else None


def fl32(value: Fraction) -> Fraction:
    """Returns `value` rounded to float32; it must not overflow."""
    result = rounded(value, "F32")
    assert result is not None
    return result


def bits_of(value: Fraction | None, dtype: str, negative: bool) -> int:
    """Returns the bit pattern of a number of `dtype` (None: an infinity).

    `negative` gives zero and infinity their sign.
    """
    width = {"F32": 32, "BF16": 16, "F16": 16}[dtype]
    if value is None or value == 0:
        infinity = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}[dtype]
        return (0 if value is not None else infinity) | (negative << (width - 1))
    if dtype == "F16":
        return int(np.float16(float(value)).view(np.uint16))
    word = int(np.float32(float(value)).view(np.uint32))
    return word if dtype == "F32" else word >> 16
