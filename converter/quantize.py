"""The int8 quantizer: `formats/schemes/int8.py` again, blocked so that every intermediate stays in cache.

Per weight it moves 2 bytes in (bf16) and 1 byte out; the rest happens in buffers of 64 Ki elements. Codes and scales equal
the reference's bit for bit: the same single division, rounding to even, and cast.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.schemes.int8 import MIN_SCALE

_SUB_ELEMENTS = 1 << 16
_MAGNITUDE = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

Words = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class RowScales:
    """Largest magnitudes of rows.

    Attributes:
        absmax: float32 [rows]; meaningless where not finite.
        finite: whether no weight is NaN or infinite.
    """

    absmax: NDArray[np.float32]
    finite: bool

    @property
    def tiny(self) -> bool:
        """Whether some row is not zero but so small that its scale would be subnormal."""
        return has_tiny_scale(self.absmax)


class _Scratch(threading.local):
    """Buffers of one thread: float32 quotients and rounded values, and unsigned words."""

    def __init__(self) -> None:
        self.elements = 0

    def reserve(self, elements: int) -> None:
        if elements > self.elements:
            self.quotient = np.empty(elements, np.float32)
            self.rounded = np.empty(elements, np.float32)
            self.words = np.empty(elements, np.uint32)
            self.elements = elements


_SCRATCH = _Scratch()


def has_tiny_scale(absmax: NDArray[np.float32]) -> bool:
    """Whether a channel's largest magnitude (float32 [channels]) is not zero and gives a scale below 2^-126."""
    return bool(((absmax > 0) & (np.divide(absmax, np.float32(127)) < np.float32(MIN_SCALE))).any())


def row_absmax(words: Words, dtype: str) -> RowScales:
    """Returns the largest magnitudes of the rows of `words`, unsigned [rows, cols] bit patterns of BF16, F16 or F32."""
    rows, cols = words.shape
    step = max(1, _SUB_ELEMENTS // cols)
    bits = np.empty(rows, words.dtype)
    _SCRATCH.reserve(min(rows, step) * cols)
    for row in range(0, rows, step):
        block = words[row : row + step]
        magnitude = _SCRATCH.words.view(words.dtype)[: block.size].reshape(block.shape)
        np.bitwise_and(block, words.dtype.type(_MAGNITUDE[dtype]), out=magnitude)
        magnitude.max(axis=1, out=bits[row : row + step])
    return _from_magnitudes(bits, dtype)


def column_absmax(words: Words, dtype: str) -> RowScales:
    """As `row_absmax`, of the columns: the result has one entry per column."""
    bits = np.bitwise_and(words, words.dtype.type(_MAGNITUDE[dtype])).max(axis=0)
    return _from_magnitudes(bits, dtype)


def count_non_finite(words: Words, dtype: str) -> NDArray[np.int64]:
    """Returns int64 [rows]: how many weights of each row are NaN or infinite."""
    magnitude = np.bitwise_and(words, words.dtype.type(_MAGNITUDE[dtype]))
    counts: NDArray[np.int64] = np.count_nonzero(magnitude >= _INFINITY[dtype], axis=1)
    return counts


def quantize_block(words: Words, dtype: str, scales: NDArray[np.float32], codes: NDArray[np.int8]) -> float:
    """Quantizes a block of rows.

    Args:
        words: unsigned [rows, cols], bit patterns of finite BF16, F16 or F32 weights.
        dtype: which of them.
        scales: float32 [rows, 1] or [1, cols].
        codes: int8 [rows, cols], receives the codes.

    Returns:
        The worst absolute error: max of |quotient - code| * scale, in float32.
    """
    rows, cols = words.shape
    step = max(1, _SUB_ELEMENTS // cols)
    _SCRATCH.reserve(min(rows, step) * cols)
    worst = 0.0
    for row in range(0, rows, step):
        block = words[row : row + step]
        scale = scales if scales.shape[0] == 1 else scales[row : row + step]
        quotient = _SCRATCH.quotient[: block.size].reshape(block.shape)
        rounded = _SCRATCH.rounded[: block.size].reshape(block.shape)
        np.divide(_as_float32(block, dtype, quotient), scale, out=quotient)
        np.rint(quotient, out=rounded)
        np.copyto(codes[row : row + step], rounded, casting="unsafe")
        np.subtract(quotient, rounded, out=quotient)
        worst = max(worst, _worst(quotient, scale))
    return worst


def _worst(error: NDArray[np.float32], scale: NDArray[np.float32]) -> float:
    """Max |error| * scale over a block whose scales are per row ([rows, 1]) or per column ([1, cols])."""
    np.abs(error, out=error)
    largest = error.max(axis=1, keepdims=True) if scale.shape[1] == 1 else error.max(axis=0, keepdims=True)
    return float((largest * scale).max())


def _as_float32(block: Words, dtype: str, out: NDArray[np.float32]) -> NDArray[np.float32]:
    if dtype == "F32":
        return block.view(np.float32)
    if dtype == "F16":
        np.copyto(out, block.view(np.float16))
        return out
    bits = out.view(np.uint32)
    np.copyto(bits, block)
    np.left_shift(bits, np.uint32(16), out=bits)
    return out


def _from_magnitudes(bits: Words, dtype: str) -> RowScales:
    absmax = np.empty(bits.shape, np.float32)
    return RowScales(np.array(_as_float32(bits, dtype, absmax)), bool((bits < _INFINITY[dtype]).all()))
