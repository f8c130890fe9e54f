"""Scheme `int8`: symmetric, one float32 scale per output channel, codes in [-127, 127].

    scale_c = min(fl32(max|w_c| / 127), MAX_SCALE), 1.0 for a channel of zeros
    code    = rint(fl32(w / scale_c)), ties to even
    w'      = cast(fl32(code * scale_c)), one rounding to the target type

The semantics are those of channel-wise symmetric int8 in compressed-tensors, so nothing is lost in going there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.errors import DecodeError

MAX_CODE = 127
MAX_SCALE = float.fromhex("0x1.020406p+121")
"""Largest scale: 127 times it is the last finite float32. One step more, and the largest code would become an infinity."""

MIN_SCALE = 2.0**-126
"""Smallest scale: below it float32 is subnormal, which GPUs flush to zero. Such tensors are stored `lossless`."""


def channel_scales(absmax: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 [channels] scales for the channels' largest magnitudes (float32 [channels], finite, >= 0)."""
    scales = np.divide(absmax, np.float32(MAX_CODE), dtype=np.float32)
    np.minimum(scales, np.float32(MAX_SCALE), out=scales)
    scales[absmax == 0] = 1.0
    return scales


def quantize(weights: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """Returns int8 codes for finite float32 `weights`; `scales` must broadcast against them and hold no code beyond 127."""
    return np.rint(np.divide(weights, scales, dtype=np.float32)).astype(np.int8)


def dequantize(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns fl32(code * scale); `scales` float32 must broadcast against `codes`."""
    return np.multiply(codes.astype(np.float32), scales, dtype=np.float32)


def check_codes(codes: NDArray[np.int8]) -> None:
    """Raises DecodeError where a code is -128, which no writer may produce."""
    if codes.size and int(codes.min()) < -MAX_CODE:
        raise DecodeError("code -128 is not allowed", got=-128, expected=f"-{MAX_CODE} to {MAX_CODE}")


def check_scales(scales: NDArray[np.float32]) -> None:
    """Raises DecodeError where a scale is not in [MIN_SCALE, MAX_SCALE]."""
    bad = ~((scales >= np.float32(MIN_SCALE)) & (scales <= np.float32(MAX_SCALE)))
    if bad.any():
        channel = int(bad.argmax())
        raise DecodeError(
            f"scale of channel {channel} is not allowed", got=scales[channel], expected=f"{MIN_SCALE} to {MAX_SCALE}"
        )
