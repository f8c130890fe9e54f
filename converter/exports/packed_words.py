"""Codes of 2 to 8 bits in words of 32 bits, as the compressed-tensors library packs them.

A code of `width` bits is stored as code + 2^(width - 1), unsigned. Codes of a row follow each other
without gaps, the first in the lowest bits; a code may begin in one word and end in the next. Read
from compressed-tensors 0.20.0, `compressors/pack_quantized/helpers.py`; the library packs so from
0.18.0 on. Before, widths other than 2, 4 and 8 left the last bits of a word unused.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTHS = range(2, 9)
"""Bits of a code that vLLM and compressed-tensors know, but for 1."""

WORD_BITS = 32
_TOGETHER = 8
"""Codes that fill whole bytes together."""


def least_width(lowest: int, highest: int) -> int | None:
    """Returns the fewest bits that hold all codes from `lowest` to `highest`; None: beyond 8.

    Examples:
        >>> least_width(-4, 3), least_width(-4, 4), least_width(0, 128)
        (3, 4, None)
    """
    return next((width for width in WIDTHS if holds(width, lowest, highest)), None)


def holds(width: int, lowest: int, highest: int) -> bool:
    """Returns whether all codes from `lowest` to `highest` have at most `width` bits."""
    half = 1 << (width - 1)
    return -half <= lowest and highest < half


def packed_columns(columns: int, width: int) -> int:
    """Returns the number of words that a row of `columns` codes takes.

    Examples:
        >>> packed_columns(5, 8), packed_columns(32, 5)
        (2, 5)
    """
    return -(-columns * width // WORD_BITS)


def pack_codes(codes: NDArray[np.int8], width: int) -> NDArray[np.int32]:
    """Packs codes.

    Args:
        codes: int8 [rows, cols], each of at most `width` bits (`holds`).
        width: bits of a code, one of `WIDTHS`.

    Returns:
        int32 [rows, packed_columns(cols, width)]; what is left of a last word is zero.
    """
    rows, cols = codes.shape
    runs = -(-cols // _TOGETHER)
    half = 1 << (width - 1)
    values = np.zeros((rows, runs * _TOGETHER), np.uint64)
    values[:, :cols] = codes.astype(np.int16) + half
    places = np.arange(_TOGETHER, dtype=np.uint64)
    shifted = values.reshape(rows, runs, _TOGETHER)
    shifted <<= places * np.uint64(width)
    joined = np.bitwise_or.reduce(shifted, axis=2)
    stored = joined.astype("<u8").view(np.uint8)
    # Eight codes side by side take `width` whole bytes.
    used = stored.reshape(rows, runs, 8)[:, :, :width]
    used_bytes = runs * width
    row_bytes = 4 * packed_columns(cols, width)
    words = np.zeros((rows, max(row_bytes, used_bytes)), np.uint8)
    words[:, :used_bytes] = used.reshape(rows, used_bytes)
    # Behind the last code there are only zeros.
    row_words = np.ascontiguousarray(words[:, :row_bytes])
    return row_words.view("<i4")
