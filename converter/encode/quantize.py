"""The int8 quantizer, by the native core or in blocks whose intermediates stay in the cache.

Codes and scales equal the reference's bit for bit: the same single division, rounding to even, and
cast.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.codecs import native
from codecllm.formats.schemes.int8 import MAX_WIDE_CODE, MIN_SCALE, MIN_WIDE_CODE, channel_scales

# 256 KiB as float32: intermediates stay in the second-level cache of a core.
_SUB_ELEMENTS = 1 << 16
_MAGNITUDE = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}

# From here on a float32 rounds to infinity.
_TOO_LARGE = {"BF16": float.fromhex("0x1.ffp127"), "F16": 65520.0, "F32": math.inf}

_TYPES = {"BF16": 0, "F16": 1, "F32": 2}  # and results, of the native core's quantize_rows
_PROBLEMS = (None, "non_finite", "tiny_scale")
_NOT_READ = 3

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
            self.steps = np.empty(elements, np.float32)
            self.elements = elements


_SCRATCH = _Scratch()


def has_tiny_scale(absmax: NDArray[np.float32]) -> bool:
    """Whether a channel, by its largest magnitude, has a scale below 2^-126 and is not zero."""
    return bool(((absmax > 0) & (np.divide(absmax, np.float32(127)) < np.float32(MIN_SCALE))).any())


def row_absmax(words: Words, dtype: str) -> RowScales:
    """Returns the largest magnitude of each row of `words`, bit patterns of BF16, F16 or F32."""
    rows, cols = words.shape
    step = max(1, _SUB_ELEMENTS // cols)
    # Magnitudes of floats are ordered like their bits as integers: no weight has to be converted.
    bits = np.empty(rows, words.dtype)
    if native.core is not None and words.size:
        native.core.row_largest(words, words.itemsize, bits)
        return _from_magnitudes(bits, dtype)
    _SCRATCH.reserve(min(rows, step) * cols)
    for row in range(0, rows, step):
        block = words[row : row + step]
        magnitude = _SCRATCH.words.view(words.dtype)[: block.size].reshape(block.shape)
        np.bitwise_and(block, words.dtype.type(_MAGNITUDE[dtype]), out=magnitude)
        magnitude.max(axis=1, out=bits[row : row + step])
    return _from_magnitudes(bits, dtype)


def quantize_rows(
    words: Words, dtype: str, codes: NDArray[np.int8]
) -> tuple[NDArray[np.float32], float, str | None]:
    """Finds the scales of rows and quantizes them.

    Args:
        words: unsigned [rows, cols], bit patterns of BF16, F16 or F32 weights.
        dtype: which of them.
        codes: int8 [rows, cols], receives the codes.

    Returns:
        The largest magnitude of each row (float32), the worst absolute error as of
        `quantize_block`, and why int8 cannot represent the rows, or None. If it cannot nothing
        else is valid: a weight is not finite (`non_finite`), or a scale would be subnormal
        (`tiny_scale`).
    """
    rows = row_absmax(words, dtype)
    if not rows.finite or rows.tiny:
        return rows.absmax, 0.0, "tiny_scale" if rows.finite else "non_finite"
    worst = quantize_block(words, dtype, channel_scales(rows.absmax)[:, None], codes)
    return rows.absmax, worst, None


def quantize_stored_rows(
    source: SourceTensor, first: int, codes: NDArray[np.int8], memory: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], float, str | None]:
    """Reads rows and does `quantize_rows`, by one call of the native core.

    Args:
        source: a tensor of type BF16, F16 or F32.
        first: its first element.
        codes: int8 [rows, cols], receives the codes; one or more.
        memory: uint8, a row's bytes or more: what it holds is read at a time.

    Raises:
        TruncatedError, OSError: the rows cannot be read.
    """
    itemsize = source.dtype.itemsize
    if native.core is not None and source.is_stored:
        absmax = np.empty(len(codes), np.float32)
        with source.file.opened() as descriptor:
            state, worst = native.core.quantize_rows(
                descriptor,
                source.entry.start + first * itemsize,
                _TYPES[source.dtype.name],
                absmax,
                codes,
                memory,
            )
        if state != _NOT_READ:
            return absmax, worst, _PROBLEMS[state]
    # Without the core, where elements are computed, or to say why it could not read.
    words = source.read_elements(first, first + codes.size).reshape(codes.shape)
    return quantize_rows(words, source.dtype.name, codes)


def column_absmax(words: Words, dtype: str) -> RowScales:
    """As `row_absmax`, of the columns: the result has one entry per column."""
    bits = np.bitwise_and(words, words.dtype.type(_MAGNITUDE[dtype])).max(axis=0)
    return _from_magnitudes(bits, dtype)


def count_non_finite(words: Words, dtype: str) -> NDArray[np.int64]:
    """Returns int64 [rows]: how many weights of each row are NaN or infinite."""
    magnitude = np.bitwise_and(words, words.dtype.type(_MAGNITUDE[dtype]))
    counts: NDArray[np.int64] = np.count_nonzero(magnitude >= _INFINITY[dtype], axis=1)
    return counts


def quantize_block(
    words: Words, dtype: str, scales: NDArray[np.float32], codes: NDArray[np.int8]
) -> float:
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
    if native.core is not None and words.size and dtype != "F16":
        by_column = scales.shape[0] == 1 and (rows > 1 or scales.shape[1] > 1)
        steps = np.ascontiguousarray(scales)
        return float(native.core.quantize(words, words.itemsize, steps, by_column, codes))
    step = max(1, _SUB_ELEMENTS // cols)
    _SCRATCH.reserve(min(rows, step) * cols)
    worst = 0.0
    for row in range(0, rows, step):
        block = words[row : row + step]
        scale = scales if scales.shape[0] == 1 else scales[row : row + step]
        quotient = _SCRATCH.quotient[: block.size].reshape(block.shape)
        rounded_values = _SCRATCH.rounded[: block.size].reshape(block.shape)
        np.divide(as_float32(block, dtype, quotient), scale, out=quotient)
        np.rint(quotient, out=rounded_values)
        np.copyto(codes[row : row + step], rounded_values, casting="unsafe")
        np.subtract(quotient, rounded_values, out=quotient)
        worst = max(worst, _worst(quotient, scale))
    return worst


@dataclass(frozen=True, slots=True)
class Quantized:
    """The result of quantizing a block under given steps.

    Attributes:
        finite: whether no weight is NaN or infinite; nothing else is valid if one is.
        lowest, highest: the extreme codes; if one passes the format's range nothing behind them is
            valid.
        worst_error: largest |w - code * step|, in float32.
        worst_steps: the same in steps.
        overflows: whether a code times its step is infinite as the weights' dtype; then nothing
            behind it is valid.
    """

    finite: bool
    lowest: float = 0.0
    highest: float = 0.0
    worst_error: float = 0.0
    worst_steps: float = 0.0
    overflows: bool = False


def quantize_steps(
    words: Words,
    dtype: str,
    scales: tuple[NDArray[np.float32], NDArray[np.float32] | None],
    codes: NDArray[np.int16],
    has_codes: bool,
    deadzone: float = 0.0,
) -> Quantized:
    """Quantizes a block of rows under steps, or measures codes that the caller has chosen.

    Args:
        words: unsigned [rows, cols], bit patterns of BF16, F16 or F32 weights.
        dtype: which of them.
        scales: float32 [rows, 1] or [1, cols], and the factors of the columns [1, cols] or None.
        codes: int16 [rows, cols], receives the codes unless `has_codes`.
        has_codes: whether `codes` holds them already.
        deadzone: how far quotients are moved toward zero before they are rounded; of no effect
            where `has_codes`.
    """
    rows, cols = words.shape
    step = max(1, _SUB_ELEMENTS // cols)
    _SCRATCH.reserve(min(rows, step) * cols)
    lowest = highest = worst_error = worst_steps = 0.0
    for row in range(0, rows, step):
        block, block_codes = words[row : row + step], codes[row : row + step]
        row_scales = scales[0] if scales[0].shape[0] == 1 else scales[0][row : row + step]
        quotient, rounded_values, sizes = (
            buffer[: block.size].reshape(block.shape)
            for buffer in (_SCRATCH.quotient, _SCRATCH.rounded, _SCRATCH.steps)
        )
        steps = row_scales if scales[1] is None else np.multiply(row_scales, scales[1], out=sizes)
        # The extremes below show overflow and NaN; numpy need not warn of each quotient.
        with np.errstate(over="ignore", invalid="ignore"):
            np.divide(as_float32(block, dtype, quotient), steps, out=quotient)
        if has_codes:
            np.copyto(rounded_values, block_codes)
        elif deadzone:
            round_toward_zero(quotient, deadzone, rounded_values)
        else:
            np.rint(quotient, out=rounded_values)
        least, most = float(rounded_values.min()), float(rounded_values.max())
        lowest, highest = min(lowest, least), max(highest, most)
        if not (least >= MIN_WIDE_CODE and most <= MAX_WIDE_CODE):
            return Quantized(not count_non_finite(block, dtype).any(), lowest, highest)
        if _overflow(rounded_values, row_scales, scales[1], _TOO_LARGE[dtype]):
            return Quantized(True, lowest, highest, overflows=True)
        if not has_codes:
            np.copyto(block_codes, rounded_values, casting="unsafe")
        np.subtract(quotient, rounded_values, out=quotient)
        np.abs(quotient, out=quotient)
        farthest = float(quotient.max())
        if not math.isfinite(farthest):  # codes were given for weights that are no numbers
            return Quantized(finite=False)
        worst_steps = max(worst_steps, farthest)
        with np.errstate(invalid="ignore"):  # infinite steps are the caller's to refuse
            np.multiply(quotient, steps, out=quotient)
        worst_error = max(worst_error, float(quotient.max()))
    return Quantized(True, lowest, highest, worst_error, worst_steps)


def _overflow(
    codes: NDArray[np.float32],
    rows: NDArray[np.float32],
    cols: NDArray[np.float32] | None,
    too_large: float,
) -> bool:
    """Whether a code times its step reaches `too_large`; factors of rows and columns give steps."""
    with np.errstate(over="ignore", invalid="ignore"):
        most = np.abs(codes).max() * rows.max() * (1 if cols is None else cols.max())
        if not most >= too_large:  # so it is for almost any block; NaN where all codes are 0
            return False
        steps = rows if cols is None else rows * cols
        return bool((np.abs(codes * steps) >= too_large).any())


def round_toward_zero(
    quotients: NDArray[np.float32], deadzone: float, out: NDArray[np.float32]
) -> None:
    """Rounds float32 quotients x as rint(fl32(x - copysign(deadzone, x))) into `out`."""
    np.copysign(np.float32(deadzone), quotients, out=out)
    with np.errstate(invalid="ignore"):
        np.subtract(quotients, out, out=out)
    np.rint(out, out=out)


def _worst(error: NDArray[np.float32], scale: NDArray[np.float32]) -> float:
    """Max |error| * scale over a block; scales are [rows, 1] or [1, cols]."""
    np.abs(error, out=error)
    largest = (
        error.max(axis=1, keepdims=True)
        if scale.shape[1] == 1
        else error.max(axis=0, keepdims=True)
    )
    return float((largest * scale).max())


def as_float32(block: Words, dtype: str, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the float32 weights of bit patterns, in `out` (same shape) or as a view."""
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
    return RowScales(
        np.array(as_float32(bits, dtype, absmax)), bool((bits < _INFINITY[dtype]).all())
    )
