"""The packed layout, slow reference: bit planes of tiles of 16 x 64 values, and exceptions.

Two kinds of matrices are packed:

- `int`: codes of 2 to 8 bits, offset by 2^(bits - 1). A code beyond the range is an exception.
- `bf16`: a float of 12 bits: sign, 4 bits of exponent relative to a base, 7 bits of mantissa. A
  weight other than zero whose exponent lies outside base + 1 ... base + 15 is an exception.

The planes hold zero in the place of an exception. Exceptions are sorted by row and column.

A tile is cut for the matrix unit `mma.m16n8k16`: 4 steps of 16 columns, 32 lanes, and in each step
8 values a lane, two to a register. Lane 4 g + t, step s, register r = 2 j + i, half h holds the
value of row 8 i + g and column 16 t + 4 s + 2 j + h of the tile. A plane of `width` bits puts the 8
values of a step into 8 * width bits.

Fields lie so that masks do most of the work. A 16-bit float whose low byte is u and whose other
bits are zero has the value u times the smallest subnormal number: a field that is masked where it
lies in that byte is a number already, and one exact multiplication moves it to its place. Fields
of the high byte need one shift before. The 4-bit plane of kind `bf16` holds the upper bits of the
exponent and, 4 places higher than their next, the sign: a rotation brings both to their places.
"""

from __future__ import annotations

import itertools
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
class Part:
    """Adjacent bits of a plane.

    Attributes:
        width: their number.
        low: place of the lowest of them in the plane's field.
        away: where they begin in a word, relative to the place of the field; beyond the last bit of
            the word they go on with the first.
    """

    width: int
    low: int = 0
    away: int = 0


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of every value of a tile.

    Attributes:
        width: bits of each value: 1, 2, 4 or 8.
        low: place of the lowest of them in the value.
        parts: where the bits of a field lie.
    """

    width: int
    low: int
    parts: tuple[Part, ...]

    @property
    def words(self) -> int:
        """Returns the uint32 words that a lane has in a tile."""
        return self.width

    def place(self, step: int, register: int, half: int) -> tuple[int, int]:
        """Returns the word of the lane and the bit at which a value's field begins.

        Examples:
            >>> planes_of(4)[0].place(step=2, register=1, half=1)
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

    The widest comes first, and holds the upper bits of the codes.

    Examples:
        >>> [(plane.width, plane.low) for plane in planes_of(7)]
        [(4, 3), (2, 1), (1, 0)]
    """
    if bits == BF16_BITS:
        return Plane(8, 0, (Part(8),)), Plane(4, 8, (Part(3), Part(1, low=3, away=7)))
    planes = []
    for width in (8, 4, 2, 1):
        if bits & width:
            planes.append(Plane(width, bits & (width - 1), (Part(width),)))
    return tuple(planes)


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
    for width, low, word, bit, row, col in _fields(bits):
        value = values[row::TILE_ROWS, col::TILE_COLS] >> low
        words[:, :, word] |= (value & ((1 << width) - 1)) << bit
    return words


def unpack_values(words: Words, bits: int) -> Values:
    """Returns the values of `pack_values`: uint32 [rows, cols]."""
    shape = (words.shape[0] * TILE_ROWS, words.shape[1] * TILE_COLS)
    values = np.zeros(shape, np.uint32)
    for width, low, word, bit, row, col in _fields(bits):
        value = (words[:, :, word] >> bit) & ((1 << width) - 1)
        values[row::TILE_ROWS, col::TILE_COLS] |= value << low
    return values


def _fields(bits: int) -> list[tuple[int, int, int, int, int, int]]:
    """Returns the adjacent bits of each value of a tile.

    Each has a width, the place of the lowest bit in the value, word and bit of the tile where they
    begin, and row and column of the value.
    """
    fields = []
    start = 0
    lanes_and_places = list(itertools.product(range(LANES), range(STEPS), range(REGISTERS), (0, 1)))
    for plane in planes_of(bits):
        for lane, step, register, half in lanes_and_places:
            group, quarter = divmod(lane, 4)
            word, bit = plane.place(step, register, half)
            row = 8 * (register % 2) + group
            col = 16 * quarter + 4 * step + 2 * (register // 2) + half
            for part in plane.parts:
                low, first = plane.low + part.low, (bit + part.away) % 32
                place = start + plane.offset(word, lane)
                fields.append((part.width, low, place, first, row, col))
        start += plane.words * LANES
    return fields


def split_bf16(weights: npt.NDArray[np.uint16], base: int) -> tuple[Values, npt.NDArray[np.bool_]]:
    """Splits bf16 patterns into floats of 12 bits: mantissa, 4 bits of exponent, sign.

    Args:
        weights: uint16 patterns, any shape.
        base: exponent below the smallest that the field can express.

    Returns:
        uint32 values, and where a weight is an exception; its value is 0.
    """
    exponent = (weights >> 7 & 0xFF).astype(np.int32) - base
    is_zero = (weights & 0x7FFF) == 0
    fits = is_zero | ((exponent >= 1) & (exponent <= BF16_EXPONENTS))
    field = np.where(is_zero, 0, exponent) & 0xF
    values = np.where(
        fits, (weights & 0x7F) | field << 7 | (weights >> 15).astype(np.int32) << 11, 0
    )
    return values.astype(np.uint32), ~fits


def join_bf16(values: Values, base: int) -> npt.NDArray[np.uint16]:
    """Returns the bf16 patterns of `split_bf16`; exceptions become zero."""
    field = values >> 7 & 0xF
    exponent = np.where(field == 0, 0, field + base)
    pattern = values >> 11 << 15 | exponent << 7 | (values & 0x7F)
    return np.asarray(pattern, np.uint16)


def best_int_bits(codes: npt.NDArray[np.int32]) -> int:
    """Returns the number of bits with the fewest bytes: planes, and 4 bytes an exception.

    Args:
        codes: integers of any shape, not empty.
    """
    outside = {}
    for bits in INT_BITS:
        half = 1 << (bits - 1)
        outside[bits] = int(np.count_nonzero((codes < -half) | (codes >= half)))
    return best_bits(outside, codes.size)


def best_bits(outside: dict[int, int], size: int) -> int:
    """Returns the number of bits with the fewest bytes.

    Args:
        outside: bits of the layout -> codes beyond them.
        size: number of codes.

    Examples:
        >>> best_bits({3: 100, 4: 1}, 1000)
        4
    """
    return min(outside, key=lambda bits: bits * size + 32 * outside[bits])


ABOVE = 8
"""What a weight above the exponents of the field costs, where one below them costs 1.

Large weights lie in few rows, and a product adds the exceptions of a row one behind another; small
ones are spread over all rows.
"""


def best_base(counts: list[int]) -> int:
    """Returns the base exponent whose exceptions cost least (`ABOVE`).

    They are at most twice the fewest, and only where that is at most 1 % of the weights.

    Args:
        counts: [256]: the weights other than zero, by exponent.

    Examples:
        >>> best_base([0] * 110 + [5] * 15 + [0] * 131)
        109
    """
    # The factor 2^base of the kernel is a bfloat16, so the base is at most 127.
    sides = [(sum(counts[: b + 1]), sum(counts[b + 1 + BF16_EXPONENTS :])) for b in range(128)]
    fewest = min(map(sum, sides))
    most = max(fewest, min(2 * fewest, sum(counts) // 100))
    costs = {
        base: below + ABOVE * above
        for base, (below, above) in enumerate(sides)
        if below + above <= most
    }
    return min(costs, key=costs.__getitem__)
