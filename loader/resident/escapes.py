"""Codes of 16 bits in 8: nearly all of them fit, and the rest are listed as escapes.

A wide tensor at 6 bits a weight has codes beyond 8 bits in 0.4 % of its elements. A matrix of int8
holds all codes, clipped; each escape holds what its code lacks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

MAX_SHARE = 0.05
"""Most escapes of a matrix: each takes 8 bytes, where a code of 16 bits takes one more byte."""

_LEAST, _MOST = -127, 127
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Escapes:
    """What clipped codes lack, row by row.

    Attributes:
        first: int32 [rows + 1]: those of row r are entries first[r] to first[r + 1] - 1.
        column: int32 [n], ascending in a row.
        extra: float32 [n]: the code minus the clipped one, an integer.
        longest: most escapes of a row.
    """

    first: torch.Tensor
    column: torch.Tensor
    extra: torch.Tensor
    longest: int

    def rows(self, start: int, stop: int) -> Escapes:
        """Returns those of some rows; their tensors are views where that is possible."""
        begin, end = int(self.first[start]), int(self.first[stop])
        first = self.first[start : stop + 1] - self.first[start]
        return Escapes(first, self.column[begin:end], self.extra[begin:end], self.longest)

    def add_to_rows(self, codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Returns codes of chosen rows, float32 [n, cols], with their escapes.

        No tensor's size depends on data, so that a CUDA graph can record this: every row looks at
        as many entries as the row with the most.

        Args:
            codes: clipped codes of `rows`.
            rows: int64 [n].
        """
        begin, end = self.first[rows].to(torch.int64), self.first[rows + 1].to(torch.int64)
        place = begin[:, None] + torch.arange(self.longest, device=rows.device)
        inside = place < end[:, None]
        place = torch.where(inside, place, 0)
        # Entries beyond a row's end go to an extra column, which is cut off.
        column = torch.where(inside, self.column[place].to(torch.int64), codes.shape[1])
        wider = torch.nn.functional.pad(codes, (0, 1)).scatter_add_(1, column, self.extra[place])
        return wider[:, :-1]

    def row_numbers(self) -> torch.Tensor:
        """Returns the row of each entry, int64 [n]."""
        counts = self.first.diff().to(torch.int64)
        rows = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(rows, counts, output_size=len(self.column))

    def add_to(self, codes: torch.Tensor) -> None:
        """Adds the escapes to codes of their rows, float32 [rows, cols], in place."""
        codes[self.row_numbers(), self.column.to(torch.int64)] += self.extra

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns `inputs @ extras.T`, float32 [n, rows], for `inputs` [n, cols]."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse (CSR tensor|invariant)", UserWarning)
            matrix = torch.sparse_csr_tensor(
                self.first,
                self.column,
                self.extra,
                (len(self.first) - 1, inputs.shape[1]),
                check_invariants=False,
            )
        return (matrix @ inputs.to(torch.float32).T).T


def split_codes(codes: torch.Tensor) -> tuple[torch.Tensor, Escapes | None] | None:
    """Splits codes into clipped ones and escapes.

    Args:
        codes: int16 or int8 [rows, cols].

    Returns:
        int8 [rows, cols], and the escapes, None where there are none; or None where there are more
        than `MAX_SHARE`.
    """
    if codes.dtype == torch.int8:
        return codes, None
    narrow = torch.empty(codes.shape, dtype=torch.int8, device=codes.device)
    places, extras = [], []
    # By blocks of rows: the intermediates take several times the bytes of the codes.
    step = max(1, _BLOCK_ELEMENTS // max(1, codes.shape[1]))
    for first_row in range(0, len(codes), step):
        block = codes[first_row : first_row + step]
        clipped = block.clamp(_LEAST, _MOST)
        narrow[first_row : first_row + step] = clipped
        place = (block != clipped).nonzero()
        extras.append((block - clipped)[place[:, 0], place[:, 1]].to(torch.float32))
        place[:, 0] += first_row
        places.append(place)
    entries = sum(map(len, places))
    if entries > MAX_SHARE * codes.numel():
        return None
    if not entries:
        return narrow, None
    row, column = torch.cat(places).unbind(1)
    counts = torch.bincount(row, minlength=len(codes))
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return narrow, Escapes(first, column.to(torch.int32), torch.cat(extras), int(counts.max()))
