"""What the kernels of experts multiply with; without Triton, so that any machine reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ENTRY_ROWS = 32
"""Rows of a tile whose exceptions lie together; the rows of a step of a kernel are a multiple."""

MOST_UNIT = 128
"""Most columns whose planes lie together."""

BYTE_BITS = 8

EXACT = 256
"""Integers up to here are exact in every 16-bit float."""


def widths_of(bits: int) -> tuple[int, ...]:
    """Returns the widths of the planes of codes of 2 to 8 bits, low bits first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def parts_of(col_scale: torch.Tensor | None) -> int:
    """Returns the number of parts of a weight: those that have scales of columns of their own."""
    return 1 if col_scale is None else col_scale.shape[1]


def unit_of(cols: int) -> int:
    """Returns the columns whose planes lie together: a power of two that divides `cols`."""
    return min(MOST_UNIT, cols & -cols)


@dataclass(frozen=True, slots=True)
class Entries:
    """Codes that have no room where the others lie.

    Attributes:
        bounds: int32 [experts, parts, tiles + 1]: the entries of rows 32 * t to 32 * t + 31 of part
            p are bounds[e, p, t] to bounds[e, p, t + 1] - 1.
        places: int32 [entries]: row in the part << 16 | column.
        values: int16 [entries].
    """

    bounds: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor

    def part(self, index: int) -> Entries:
        """Returns those of one part."""
        return Entries(self.bounds[:, index : index + 1], self.places, self.values)


@dataclass(frozen=True, slots=True)
class ExpertCodes:
    """Matrices of all experts, one or several parts of equal rows one below the other.

    Without scales of columns, all rows are one part.

    Attributes:
        codes: int8 [experts, rows, cols]; an expert's are contiguous.
        scale: float32 [experts, rows], an expert's contiguous.
        col_scale: float32 [experts, parts, cols], or None.
        wide: what codes beyond 8 bits lack, or None. Values beyond 256 are multiples of 256, so
            that 16-bit floats hold them all; a place may have two.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    col_scale: torch.Tensor | None = None
    wide: Entries | None = None

    @property
    def parts(self) -> int:
        """Number of parts whose products are launched apart."""
        return parts_of(self.col_scale)

    def part(self, index: int) -> ExpertCodes:
        """Returns one part, of views."""
        rows = self.scale.shape[1] // self.parts
        place = slice(index * rows, (index + 1) * rows)
        columns = None if self.col_scale is None else self.col_scale[:, index : index + 1]
        wide = None if self.wide is None else self.wide.part(index)
        return ExpertCodes(self.codes[:, place], self.scale[:, place], columns, wide)


@dataclass(frozen=True, slots=True)
class ExpertPlanes:
    """Matrices as those of `ExpertCodes`, in codes of 2 to 8 bits.

    There is a plane for each width of `widths_of`, and they hold the code + 2^(bits - 1). In a row
    of a plane of w bits, the `unit_of` columns from u on take unit * w / 8 bytes; the field of
    column u + c has the bits from w * (c // bytes) on of byte c % bytes.

    A code beyond `bits` has the field of 0. If it has 8 bits it is an entry of `near`, else of
    `wide`.

    Attributes:
        bits: 2 to 8.
        planes: uint8 [experts, rows, cols * width / 8] each, contiguous.
        scale: float32 [experts, rows].
        col_scale: float32 [experts, parts, cols], or None.
        near: codes of 8 bits, or None.
        wide: as in `ExpertCodes`.
    """

    bits: int
    planes: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    col_scale: torch.Tensor | None = None
    near: Entries | None = None
    wide: Entries | None = None

    @property
    def parts(self) -> int:
        """Number of parts."""
        return parts_of(self.col_scale)

    @property
    def cols(self) -> int:
        """Number of columns."""
        return self.planes[0].shape[2] * BYTE_BITS // widths_of(self.bits)[0]
