"""Packs the codes of experts into `ExpertPlanes`, and reads them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from codecllm.loader.kernels.expert_codes import (
    BYTE_BITS,
    ENTRY_ROWS,
    EXACT,
    Entries,
    ExpertPlanes,
    parts_of,
    unit_of,
    widths_of,
)

ENTRY_BITS = 48
"""Bits of an exception in memory."""

_LEAST_BITS = 2
BLOCK_ELEMENTS = 1 << 24
"""Codes that are packed at once, of one expert at least: intermediates take 8 bytes each."""

Codes = Callable[[int], torch.Tensor]
"""Number of an expert -> its codes, int8 or int16 [rows, cols]."""


def choose_bits(codes: Codes, scale: torch.Tensor, cols: int) -> int:
    """Returns the bits a code that take the fewest bytes for all experts, exceptions included.

    Args:
        codes: gives the codes.
        scale: float32 [experts, rows].
        cols: columns of a matrix.
    """
    half = 1 << (BYTE_BITS - 1)
    counts = torch.zeros(2 * half + 2, dtype=torch.int64, device=scale.device)
    for _, some in _several(codes, scale, cols):
        inside = some.view(-1).clamp(-half - 1, half).to(torch.int64) + half + 1
        counts += torch.bincount(inside, minlength=len(counts))
    total = int(counts.sum())

    def size(bits: int) -> int:
        most = 1 << (bits - 1)
        fit = int(counts[half + 1 - most : half + 1 + most].sum())
        return bits * total + ENTRY_BITS * (total - fit)

    return min(range(_LEAST_BITS, BYTE_BITS + 1), key=size)


def pack_experts(
    codes: Codes, scale: torch.Tensor, col_scale: torch.Tensor | None, cols: int, bits: int
) -> ExpertPlanes:
    """Packs the codes of all experts, a few experts at a time.

    Args:
        codes: gives them; they lie on the device of the scales.
        scale: float32 [experts, rows].
        col_scale: float32 [experts, parts, cols], or None.
        cols: columns of a matrix, a multiple of 32.
        bits: 2 to 8.
    """
    experts, rows = scale.shape
    parts = parts_of(col_scale)
    planes = tuple(
        scale.new_empty(experts, rows, cols * width // 8, dtype=torch.uint8)
        for width in widths_of(bits)
    )
    half, most = 1 << (bits - 1), 1 << (BYTE_BITS - 1)
    near, wide = _Exceptions(parts), _Exceptions(parts)
    for first, some in _several(codes, scale, cols):
        outside = (some < -half) | (some >= half)
        beyond = (some < -most) | (some >= most)
        fields = torch.where(outside, 0, some).view(-1, cols) + half
        own = slice(first, first + len(some))
        _store(fields, bits, [plane[own].view(len(fields), -1) for plane in planes])
        near.add(some, outside & ~beyond)
        wide.add(some, beyond)
    return ExpertPlanes(bits, planes, scale, col_scale, near.finish(), wide.finish())


def _several(codes: Codes, scale: torch.Tensor, cols: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Gives the number of an expert, and int16 codes [n, rows, cols] of it and some behind it."""
    experts, rows = scale.shape
    step = max(1, BLOCK_ELEMENTS // max(1, rows * cols))
    for first in range(0, experts, step):
        numbers = range(first, min(first + step, experts))
        yield first, torch.stack([codes(number).to(torch.int16) for number in numbers])


class _Exceptions:
    """Entries, some experts after the others."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._counts: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def add(self, codes: torch.Tensor, where: torch.Tensor) -> None:
        """Adds codes of experts, int16 [n, rows, cols], where a mask like them says so."""
        rows = codes.shape[1] // self._parts
        tiles = -(-rows // ENTRY_ROWS)
        expert, whole_row, col = where.nonzero().unbind(1)
        value = codes[expert, whole_row, col].to(torch.int32)
        part, row = whole_row // rows, whole_row % rows
        tile = (expert * self._parts + part) * tiles + row // ENTRY_ROWS
        place = row << 16 | col
        large = torch.where(value.abs() > EXACT, value - value % EXACT, value)
        rest = value - large
        twice = rest.nonzero().view(-1)
        if len(twice):
            tile, order = torch.cat([tile, tile[twice]]).sort(stable=True)
            place = torch.cat([place, place[twice]])[order]
            large = torch.cat([large, rest[twice]])[order]
        counts = torch.bincount(tile, minlength=len(codes) * self._parts * tiles)
        self._counts.append(counts.view(len(codes), self._parts, tiles))
        self._places.append(place.to(torch.int32))
        self._values.append(large.to(torch.int16))

    def finish(self) -> Entries | None:
        """Returns all entries; None where there are none."""
        places = torch.cat(self._places)
        if not len(places):
            return None
        counts = torch.cat(self._counts)
        ends = counts.view(-1).cumsum(0).view(counts.shape)
        bounds = torch.cat([(ends - counts)[..., :1], ends], 2)
        return Entries(bounds.to(torch.int32), places, torch.cat(self._values))


def _store(fields: torch.Tensor, bits: int, planes: Sequence[torch.Tensor]) -> None:
    """Writes fields, int16 [rows, cols] below 2^bits, to uint8 [rows, cols * width / 8] each."""
    rows, cols = fields.shape
    unit, low = unit_of(cols), 0
    for width, plane in zip(widths_of(bits), planes, strict=True):
        field = (fields >> low) & ((1 << width) - 1)
        apart = field.view(rows, cols // unit, 8 // width, unit * width // 8)
        shifts = torch.arange(0, 8, width, dtype=torch.int16, device=fields.device)
        in_bytes = (apart << shifts[:, None]).sum(2, dtype=torch.int16)
        plane.copy_(in_bytes.view(rows, -1).to(torch.uint8))
        low += width


def codes_of_expert(matrix: ExpertPlanes, number: int) -> torch.Tensor:
    """Returns the codes of an expert, int16 [rows, cols]; slow."""
    rows, cols = matrix.scale.shape[1], matrix.cols
    unit, low = unit_of(cols), 0
    codes = matrix.scale.new_zeros(rows, cols, dtype=torch.int16)
    for width, plane in zip(widths_of(matrix.bits), matrix.planes, strict=True):
        fields_of = plane[number].view(rows, cols // unit, 1, unit * width // 8).to(torch.int16)
        shifts = torch.arange(0, 8, width, dtype=torch.int16, device=codes.device)
        fields = (fields_of >> shifts[:, None]) & ((1 << width) - 1)
        codes += fields.reshape(rows, cols) << low
        low += width
    codes -= 1 << (matrix.bits - 1)
    for entries in (matrix.near, matrix.wide):
        if entries is not None:
            for index, part in enumerate(codes.chunk(matrix.parts)):
                own = entries.bounds[number, index]
                mine = slice(int(own[0]), int(own[-1]))
                place = entries.places[mine].to(torch.int64)
                at = (place >> 16 & 0xFFFF, place & 0xFFFF)
                part.index_put_(at, entries.values[mine], accumulate=True)
    return codes
