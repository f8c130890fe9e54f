"""The packed layout, slow reference: bit planes of tiles of 16 x 64 values, and exceptions.

Two kinds of matrices are packed:

- `int`: codes of 2 to 8 bits, offset by 2^(bits - 1). A code beyond the range is an exception.
- `bf16`: a byte of sign and mantissa, and 4 bits of exponent relative to a base, 12 bits in all. A
  weight other than zero whose exponent lies outside base + 1 ... base + 15 is an exception.

The planes hold zero in the place of an exception. Exceptions are sorted by row and column.

A tile is cut for the matrix unit `mma.m16n8k16`: 4 steps of 16 columns, 32 lanes, and in each step
8 values a lane, two to a register. Lane 4 g + t, step s, register r = 2 j + i, half h holds the
value of row 8 i + g and column 16 t + 4 s + 2 j + h of the tile. A plane of `width` bits puts the 8
values of a step into 8 * width bits; fields lie so that one shift and one mask give both halves of
a register.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TILE_ROWS = 16
TILE_COLS = 64
LANES = 32
STEPS = 4
REGISTERS = 4
INT_BITS = range(2, 9)
BF16_BITS = 12
BF16_EXPONENTS = 15
"""Exponents that the 4-bit field of kind `bf16` can express, zero apart."""

Words = npt.NDArray[np.uint32]
Values = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Plane:
    """Consecutive bits of every value of a tile.

    Attributes:
        width: bits of each value: 1, 2, 4 or 8.
        low: place of the lowest of them in the value.
    """

    width: int
    low: int

    @property
    def words(self) -> int:
        """Returns the uint32 words that a lane has in a tile."""
        return self.width

    def place(self, step: int, register: int, half: int) -> tuple[int, int]:
        """Returns the word of the lane and the bit at which a value's field begins.

        >>> Plane(4, 0).place(step=2, register=1, half=1)
        (2, 20)
        """
        if self.width == 8:
            return 2 * step + register // 2, 16 * half + 8 * (register % 2)
        steps_per_word = 4 // self.width
        bit = 16 * half + 4 * self.width * (step % steps_per_word) + self.width * register
        return step // steps_per_word, bit

    def offset(self, word: int, lane: int) -> int:
        """Returns the place of a lane's word in the plane; four words at most are adjacent."""
        adjacent = min(self.words, 4)
        return (word // adjacent * LANES + lane) * adjacent + word % adjacent


def planes_of(bits: int) -> tuple[Plane, ...]:
    """Returns the planes of a layout of `bits` bits a value, in their order within a tile.

    >>> [(plane.width, plane.low) for plane in planes_of(7)]
    [(4, 0), (2, 4), (1, 6)]
    """
    if bits == BF16_BITS:
        widths: tuple[int, ...] = (8, 4)
    elif bits == 8:
        widths = (4, 4)
    else:
        widths = tuple(width for width in (4, 2, 1) if bits & width)
    lows = np.cumsum([0, *widths])[:-1]
    return tuple(Plane(width, int(low)) for width, low in zip(widths, lows, strict=True))


def tile_words(bits: int) -> int:
    """Returns the words of a tile: `bits` of each of its values, and no more."""
    return bits * TILE_ROWS * TILE_COLS // 32


def pack_values(values: Values, bits: int) -> Words:
    """Packs values below 2^bits.

    Args:
        values: uint32 [rows, cols]; rows and columns are multiples of the tile's.
        bits: bits of each value.

    Returns:
        uint32 [row tiles, column tiles, words of a tile].
    """
    row_tiles, col_tiles = values.shape[0] // TILE_ROWS, values.shape[1] // TILE_COLS
    words = np.zeros((row_tiles, col_tiles, tile_words(bits)), np.uint32)
    for index, (row, col) in _fields(bits):
        field, word, bit = index
        value = values[row::TILE_ROWS, col::TILE_COLS] >> field.low
        words[:, :, word] |= (value & ((1 << field.width) - 1)) << bit
    return words


def unpack_values(words: Words, bits: int) -> Values:
    """Returns the values of `pack_values`: uint32 [rows, cols]."""
    shape = (words.shape[0] * TILE_ROWS, words.shape[1] * TILE_COLS)
    values = np.zeros(shape, np.uint32)
    for index, (row, col) in _fields(bits):
        field, word, bit = index
        value = (words[:, :, word] >> bit) & ((1 << field.width) - 1)
        values[row::TILE_ROWS, col::TILE_COLS] |= value << field.low
    return values


def _fields(bits: int) -> list[tuple[tuple[Plane, int, int], tuple[int, int]]]:
    """Returns plane, word and bit of each field of a tile, and row and column of its value."""
    fields = []
    start = 0
    for plane in planes_of(bits):
        for lane in range(LANES):
            group, quarter = divmod(lane, 4)
            for step in range(STEPS):
                for register in range(REGISTERS):
                    for half in range(2):
                        word, bit = plane.place(step, register, half)
                        row = 8 * (register % 2) + group
                        col = 16 * quarter + 4 * step + 2 * (register // 2) + half
                        fields.append(((plane, start + plane.offset(word, lane), bit), (row, col)))
        start += plane.words * LANES
    return fields


def split_bf16(weights: npt.NDArray[np.uint16], base: int) -> tuple[Values, npt.NDArray[np.bool_]]:
    """Splits bf16 patterns into values of 12 bits: sign and mantissa, then 4 bits of exponent.

    Args:
        weights: uint16 patterns, any shape.
        base: exponent below the smallest that the field can express.

    Returns:
        uint32 values, and where a weight is an exception; its value is 0.
    """
    exponent = (weights >> 7 & 0xFF).astype(np.int32) - base
    is_zero = (weights & 0x7FFF) == 0
    fits = is_zero | ((exponent >= 1) & (exponent <= BF16_EXPONENTS))
    sign_mantissa = (weights >> 8 & 0x80) | (weights & 0x7F)
    field = np.where(is_zero, 0, exponent) & 0xF
    values = np.where(fits, sign_mantissa | field << 8, 0)
    return values.astype(np.uint32), ~fits


def join_bf16(values: Values, base: int) -> npt.NDArray[np.uint16]:
    """Returns the bf16 patterns of `split_bf16`; exceptions become zero."""
    field = values >> 8
    exponent = np.where(field == 0, 0, field + base)
    pattern = (values & 0x80) << 8 | exponent << 7 | (values & 0x7F)
    return np.asarray(pattern, np.uint16)


def best_int_bits(codes: npt.NDArray[np.int32]) -> int:
    """Returns the number of bits with the fewest bytes: planes, and 4 bytes an exception.

    Args:
        codes: integers of any shape, not empty.
    """
    cost = {}
    for bits in INT_BITS:
        half = 1 << (bits - 1)
        outside = np.count_nonzero((codes < -half) | (codes >= half))
        cost[bits] = bits * codes.size + 32 * outside
    return min(cost, key=lambda bits: cost[bits])
