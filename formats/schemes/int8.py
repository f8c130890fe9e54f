"""Scheme `int8`: symmetric, one float32 scale per output channel, codes in [-127, 127].

    scale_c = min(fl32(max|w_c| / 127), MAX_SCALE), 1.0 for a channel of zeros
    code    = rint(fl32(w / scale_c)), ties to even
    w'      = cast(fl32(code * scale_c)), one rounding to the target type

The semantics are those of channel-wise symmetric int8 in compressed-tensors, so nothing is lost in
going there.

Where a tensor has a scale for each column too, the step of element (r, c) is fl32(row_scale[r] *
col_scale[c]) and takes the place of scale_c. Where it is wide, its codes have 16 bits in two
planes: code = low + 2**low_bits * high.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.errors import DecodeError

MAX_CODE = 127
MAX_SCALE = float.fromhex("0x1.020406p+121")
"""Largest scale: 127 times it is the last finite float32.

With the next larger scale the largest code would become an infinity.
"""

MIN_SCALE = 2.0**-126
"""Smallest scale: below it float32 is subnormal, which GPUs flush to zero.

Tensors with smaller scales are stored `lossless`.
"""

MIN_WIDE_CODE = -128 - 127 * 256
MAX_WIDE_CODE = 127 + 127 * 256
"""Range of the codes of a wide tensor."""

MAX_WIDE_STEP = 2.0**112
"""Largest step of a wide tensor: any code times it is finite."""


def channel_scales(absmax: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 [channels] scales for the largest magnitudes of the channels.

    Args:
        absmax: float32 [channels], finite, 0 or more.

    Examples:
        >>> channel_scales(np.array([127, 63.5, 0], np.float32)).tolist()
        [1.0, 0.5, 1.0]
    """
    scales = np.divide(absmax, np.float32(MAX_CODE), dtype=np.float32)
    np.minimum(scales, np.float32(MAX_SCALE), out=scales)
    # Any scale fits a channel of zeros; this one is normal and the same for each writer.
    scales[absmax == 0] = 1.0
    return scales


def quantize(
    weights: NDArray[np.float32],
    scales: NDArray[np.float32],
    wide: bool = False,
    deadzone: float = 0.0,
) -> NDArray[np.signedinteger[Any]]:
    """Returns the codes of weights.

    Args:
        weights: finite float32.
        scales: float32 steps that broadcast against the weights.
        wide: whether codes have 16 bits.
        deadzone: a float32 value by which quotients are moved toward zero before they are rounded.

    Returns:
        int8, or int16 where `wide`, of the shape of the weights. Codes beyond the range, which no
        conversion makes, come back as its ends.

    Examples:
        >>> weights = np.array([1.0, -0.74, 0.26], np.float32)
        >>> quantize(weights, np.float32(0.5)).tolist()
        [2, -1, 1]
        >>> quantize(weights, np.float32(0.5), deadzone=0.25).tolist()
        [2, -1, 0]
    """
    # Quotients beyond float32 become infinite and are clipped below.
    with np.errstate(over="ignore", invalid="ignore"):
        quotients = np.divide(weights, scales, dtype=np.float32)
        if deadzone:
            # Both operands are float32: a wider difference would round otherwise.
            quotients -= np.copysign(np.float32(deadzone), quotients)
        nearest = np.rint(quotients)
    if wide:
        return np.clip(nearest, MIN_WIDE_CODE, MAX_WIDE_CODE).astype(np.int16)
    return np.clip(nearest, -MAX_CODE, MAX_CODE).astype(np.int8)


def dequantize(
    codes: NDArray[np.signedinteger], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Returns fl32(code * scale); `scales` float32 must broadcast against `codes`.

    Examples:
        >>> dequantize(np.array([2, -1, 0], np.int8), np.array([0.5], np.float32)).tolist()
        [1.0, -0.5, 0.0]
    """
    return np.multiply(codes.astype(np.float32), scales, dtype=np.float32)


def step_sizes(
    row_scales: NDArray[np.float32], col_scales: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Returns the steps of a matrix: fl32(row scale * column scale).

    Args:
        row_scales: float32 [rows].
        col_scales: float32 [cols], or None where columns have no scales.

    Returns:
        float32 [rows, cols], or [rows, 1] where columns have no scales.

    Examples:
        >>> rows, cols = np.array([1, 2], np.float32), np.array([1, 0.5], np.float32)
        >>> step_sizes(rows, cols).tolist()
        [[1.0, 0.5], [2.0, 1.0]]
    """
    if col_scales is None:
        return row_scales[:, None]
    return np.multiply(row_scales[:, None], col_scales[None, :], dtype=np.float32)


def split_codes(
    codes: NDArray[np.int16], low_bits: int
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Returns the low and the high plane of int16 codes, int8 of the same shape.

    `low` is the code modulo 2**low_bits, in [-2**(low_bits - 1), 2**(low_bits - 1)); `high` is the
    rest, which must fit.

    Args:
        codes: int16 in [MIN_WIDE_CODE, MAX_WIDE_CODE].
        low_bits: 1 to 8.

    Examples:
        >>> low, high = split_codes(np.array([5, -300, 127], np.int16), 8)
        >>> low.tolist(), high.tolist()
        ([5, -44, 127], [0, -1, 0])
        >>> join_codes(low, high, 8).tolist()
        [5, -300, 127]
    """
    low = codes << (16 - low_bits) >> (16 - low_bits)
    # The difference lies within int16 for every code of the range.
    high = (codes - low) >> low_bits
    return low.astype(np.int8), high.astype(np.int8)


def join_codes(low: NDArray[np.int8], high: NDArray[np.int8], low_bits: int) -> NDArray[np.int16]:
    """Returns low + 2**low_bits * high, int16 of the same shape."""
    return low.astype(np.int16) + (high.astype(np.int16) << low_bits)


def codes_hold(codes: NDArray[np.int8]) -> bool:
    """Whether no code (of a wide tensor: no high part) is -128, which no writer may produce."""
    return not codes.size or int(codes.min()) >= -MAX_CODE


def check_codes(codes: NDArray[np.int8]) -> None:
    """Raises DecodeError where `codes_hold` does not."""
    if not codes_hold(codes):
        raise DecodeError(
            "code -128 is not allowed", got=-128, expected=f"-{MAX_CODE} to {MAX_CODE}"
        )


def check_scales(scales: NDArray[np.float32], owner: str = "channel") -> None:
    """Checks scales one by one.

    Args:
        scales: float32 [n].
        owner: `channel` or `column`, for the error.

    Raises:
        DecodeError: a scale is not in [MIN_SCALE, MAX_SCALE].
    """
    # Written so that NaN, which fails every comparison, is refused too.
    bad = ~((scales >= np.float32(MIN_SCALE)) & (scales <= np.float32(MAX_SCALE)))
    if bad.any():
        channel = int(bad.argmax())
        raise DecodeError(
            f"scale of {owner} {channel} is not allowed",
            got=scales[channel],
            expected=f"{MIN_SCALE} to {MAX_SCALE}",
        )


def check_steps(
    row_scales: NDArray[np.float32], col_scales: NDArray[np.float32] | None, wide: bool
) -> None:
    """Checks all scales of a tensor, and that no step is subnormal or too large.

    Raises:
        DecodeError: a scale is not in [MIN_SCALE, MAX_SCALE], or a step not in that range (wide: up
            to MAX_WIDE_STEP).
    """
    check_scales(row_scales)
    largest = MAX_WIDE_STEP if wide else MAX_SCALE
    if col_scales is not None:
        check_scales(col_scales, "column")
    factors = np.ones(1, np.float32) if col_scales is None else col_scales
    with np.errstate(over="ignore", under="ignore"):
        # Rounding is monotonic: the extreme steps are the products of the extreme scales.
        lowest = row_scales.min() * factors.min()
        highest = row_scales.max() * factors.max()
    if not (lowest >= np.float32(MIN_SCALE) and highest <= np.float32(largest)):
        raise DecodeError(
            "a step is not allowed",
            got=f"{lowest} to {highest}",
            expected=f"{MIN_SCALE} to {largest}",
        )
