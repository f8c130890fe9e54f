"""A packed matrix on a device: its planes, its exceptions, and its scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from codecllm.loader.packed import on_gpu, pack
from codecllm.loader.packed.layout import BF16_BITS, TILE_COLS, TILE_ROWS

MAX_COLS = 1 << 16
"""Most columns: an exception has 16 bits for its column."""

COL_UNIT = 16
"""Columns must be a multiple of this: a lane reads 16 inputs at once."""

MAX_EXCEPTION_SHARE = 0.05
"""Most exceptions of a packed matrix; each costs 4 bytes and a read of its input."""

_BF16_ONE = 127
"""Exponent of 1 in bfloat16."""

_GATHER_ROWS = 1 << 12


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [rows, cols] in the packed layout (`layout.py`).

    Attributes:
        rows: number of rows.
        cols: number of columns, a multiple of 16 below 65,537.
        bits: 2 to 8 for codes, 12 for bfloat16 weights.
        base: of the exponents of bfloat16 weights; 0 for codes.
        words: int32 [row tiles, column tiles, 32 * bits].
        first: int32 [rows + 1]: the exceptions of row r are entries first[r] to first[r + 1] - 1.
            None: no exceptions.
        entries: int32: column | value << 16. The value is a code (int16) or a bfloat16 pattern.
        scale: float32 [rows] of codes, or None.
        col_scale: float32 [cols] of codes, or None.
        longest: most exceptions of a row.
    """

    rows: int
    cols: int
    bits: int
    base: int
    words: torch.Tensor
    first: torch.Tensor | None
    entries: torch.Tensor | None
    scale: torch.Tensor | None = None
    col_scale: torch.Tensor | None = None
    longest: int = 0

    @property
    def is_bf16(self) -> bool:
        """Whether the matrix holds bfloat16 weights; otherwise codes."""
        return self.bits == BF16_BITS

    @property
    def factor(self) -> int:
        """2^base as two bfloat16 in one word, for the kernels; 0 for codes."""
        exponent = (self.base + _BF16_ONE) << 7 if self.is_bf16 else 0
        return exponent << 16 | exponent

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that hold the matrix, by the names of the attributes."""
        names = ("words", "first", "entries", "scale", "col_scale")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def to(self, device: torch.device) -> PackedMatrix:
        """Returns the matrix on another device."""
        parts = {name: part.to(device) for name, part in self.tensors().items()}
        return replace(
            self,
            words=parts["words"],
            first=parts.get("first"),
            entries=parts.get("entries"),
            scale=parts.get("scale"),
            col_scale=parts.get("col_scale"),
        )

    def nbytes(self) -> int:
        """Returns the bytes of memory of all parts."""
        return sum(part.nbytes for part in self.tensors().values())


def can_pack(rows: int, cols: int) -> bool:
    """Whether a matrix of this size has a packed form."""
    return rows > 0 and 0 < cols <= MAX_COLS and cols % COL_UNIT == 0


def pack_bf16(weights: torch.Tensor) -> PackedMatrix | None:
    """Packs bfloat16 weights into 12 bits each.

    Args:
        weights: bfloat16 [rows, cols] on the device of the result.

    Returns:
        The matrix, or None where it has too many exceptions.

    Raises:
        ValueError: the size has no packed form (`can_pack`).
    """
    rows, cols = _size(weights)
    most = int(MAX_EXCEPTION_SHARE * weights.numel())
    if on_gpu.packs(weights):
        base = on_gpu.choose_bf16_base(weights)
        return _packed_on_gpu(weights, BF16_BITS, base, most, (None, None))
    base = pack.choose_bf16_base(weights)
    words = _new_words(weights, BF16_BITS)
    exceptions = _Exceptions(weights)
    for start, block in _blocks(weights):
        values, outside = pack.split_bf16(block, base)
        exceptions.add(start, outside, block.view(torch.int16))
        _store(words, start, values, BF16_BITS)
    if exceptions.count > most:
        return None
    first, entries, longest = exceptions.finish()
    return PackedMatrix(rows, cols, BF16_BITS, base, words, first, entries, longest=longest)


def choose_bits(codes: torch.Tensor) -> int:
    """Returns the number of bits with the fewest bytes for codes, int8 or int16 [rows, cols]."""
    choose = on_gpu.choose_int_bits if on_gpu.packs(codes) else pack.choose_int_bits
    return choose(codes)


def pack_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    col_scale: torch.Tensor | None,
    bits: int | None = None,
) -> PackedMatrix | None:
    """Packs integer codes.

    Args:
        codes: int8 or int16 [rows, cols] on the device of the result.
        scale: float32 [rows].
        col_scale: float32 [cols] or None.
        bits: 2 to 8 bits a code; None takes the number with the fewest bytes.

    Returns:
        The matrix, or None where `bits` leaves too many exceptions.

    Raises:
        ValueError: the size has no packed form (`can_pack`).
    """
    rows, cols = _size(codes)
    # The number with the fewest bytes takes less memory than dense weights in any case.
    most = codes.numel() if bits is None else int(MAX_EXCEPTION_SHARE * codes.numel())
    bits = bits or choose_bits(codes)
    if on_gpu.packs(codes):
        return _packed_on_gpu(codes, bits, 0, most, (scale, col_scale))
    half = 1 << (bits - 1)
    words = _new_words(codes, bits)
    exceptions = _Exceptions(codes)
    for start, block in _blocks(codes):
        wide = block.to(torch.int32)
        outside = (wide < -half) | (wide >= half)
        exceptions.add(start, outside, block)
        _store(words, start, torch.where(outside, 0, wide) + half, bits, fill=half)
    if exceptions.count > most:
        return None
    first, entries, longest = exceptions.finish()
    return PackedMatrix(rows, cols, bits, 0, words, first, entries, scale, col_scale, longest)


def _packed_on_gpu(
    matrix: torch.Tensor,
    bits: int,
    base: int,
    most: int,
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
) -> PackedMatrix | None:
    first: torch.Tensor | None
    first, exceptions, longest = on_gpu.count_exceptions(matrix, bits, base)
    if exceptions > most:
        return None
    if not exceptions:
        first = None
    words, entries = on_gpu.pack_rows(matrix, bits, base, first, exceptions)
    rows, cols = matrix.shape
    return PackedMatrix(rows, cols, bits, base, words, first, entries, *scales, longest)


def unpack_codes(matrix: PackedMatrix) -> torch.Tensor:
    """Returns the codes, int16 [rows, cols]."""
    values = pack.unpack_values(matrix.words, matrix.bits)[: matrix.rows, : matrix.cols]
    codes = (values - (1 << (matrix.bits - 1))).to(torch.int16)
    return _with_exceptions(matrix, codes)


def unpack_bf16(matrix: PackedMatrix) -> torch.Tensor:
    """Returns the bfloat16 weights, [rows, cols]."""
    values = pack.unpack_values(matrix.words, matrix.bits)[: matrix.rows, : matrix.cols]
    weights = pack.join_bf16(values, matrix.base)
    return _with_exceptions(matrix, weights.view(torch.int16)).view(torch.bfloat16)


def dequantize(matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Returns the weights, `dtype` [rows, cols], with the bits of dense loading; slow."""
    if matrix.is_bf16:
        return unpack_bf16(matrix).to(dtype)
    assert matrix.scale is not None
    steps = matrix.scale[:, None]
    if matrix.col_scale is not None:
        steps = steps * matrix.col_scale
    return (unpack_codes(matrix).to(torch.float32) * steps).to(dtype)


def gather(matrix: PackedMatrix, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns rows of the weights, `dtype` [n, cols], with the bits of `dequantize`.

    Args:
        matrix: the matrix.
        rows: integers [n] on its device, each in [0, matrix.rows).
        dtype: dtype of the result.
    """
    parts = [_gather(matrix, block, dtype) for block in rows.split(_GATHER_ROWS)]
    return torch.cat(parts) if parts else torch.empty(0, matrix.cols, dtype=dtype)


def _gather(matrix: PackedMatrix, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = pack.unpack_values(matrix.words[rows // TILE_ROWS], matrix.bits)
    picked = torch.arange(len(rows), device=rows.device) * TILE_ROWS + rows % TILE_ROWS
    values = values[picked, : matrix.cols]
    if matrix.is_bf16:
        pattern = pack.join_bf16(values, matrix.base).view(torch.int16)
        weights = _with_row_exceptions(matrix, rows, pattern).view(torch.bfloat16)
        return weights.to(dtype)
    assert matrix.scale is not None
    codes = (values - (1 << (matrix.bits - 1))).to(torch.int16)
    codes = _with_row_exceptions(matrix, rows, codes)
    steps = matrix.scale[rows, None]
    if matrix.col_scale is not None:
        steps = steps * matrix.col_scale
    return (codes.to(torch.float32) * steps).to(dtype)


def _with_row_exceptions(
    matrix: PackedMatrix, rows: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Puts the exceptions of `rows` into int16 [n, cols], in place.

    No tensor's size depends on data, so that a CUDA graph can record this: every row looks at as
    many entries as the row with the most.
    """
    if matrix.first is None or matrix.entries is None or not len(rows):
        return values
    begin, end = matrix.first[rows].to(torch.int64), matrix.first[rows + 1].to(torch.int64)
    place = begin[:, None] + torch.arange(matrix.longest, device=rows.device)
    inside = place < end[:, None]
    entry = matrix.entries[torch.where(inside, place, 0)].to(torch.int64)
    # Entries beyond a row's end go to an extra column, which is cut off.
    column = torch.where(inside, entry & 0xFFFF, matrix.cols)
    wider = functional.pad(values, (0, 1))
    wider.scatter_(1, column, (entry >> 16).to(torch.int16))
    return wider[:, : matrix.cols]


def _with_exceptions(matrix: PackedMatrix, values: torch.Tensor) -> torch.Tensor:
    """Puts all exceptions into int16 [rows, cols]."""
    values = values.contiguous()
    if matrix.first is not None and matrix.entries is not None:
        counts = matrix.first.diff().to(torch.int64)
        row = torch.repeat_interleave(torch.arange(matrix.rows, device=values.device), counts)
        entry = matrix.entries.to(torch.int64)
        values[row, entry & 0xFFFF] = (entry >> 16).to(torch.int16)
    return values


class _Exceptions:
    """Collects exceptions block by block."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._counts = torch.zeros(matrix.shape[0], dtype=torch.int64, device=matrix.device)
        self._entries: list[torch.Tensor] = []

    @property
    def count(self) -> int:
        """Number of the exceptions."""
        return sum(map(len, self._entries))

    def add(self, start: int, outside: torch.Tensor, values: torch.Tensor) -> None:
        """Adds the exceptions of rows from `start` on; values are int8 or int16."""
        row, col = outside.nonzero(as_tuple=True)
        self._counts[start : start + len(outside)] = outside.sum(1)
        value = values[row, col].to(torch.int32)
        self._entries.append(value << 16 | col.to(torch.int32))

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
        """Returns `first`, `entries` and `longest` of the matrix."""
        entries = torch.cat(self._entries)
        if not len(entries):
            return None, None, 0
        first = functional.pad(self._counts.cumsum(0), (1, 0)).to(torch.int32)
        return first, entries, int(self._counts.max())


def _size(matrix: torch.Tensor) -> tuple[int, int]:
    rows, cols = matrix.shape
    if not can_pack(rows, cols):
        raise ValueError(f"a matrix [{rows}, {cols}] has no packed form")
    return rows, cols


def _new_words(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    rows, cols = matrix.shape
    tiles = (-(-rows // TILE_ROWS), -(-cols // TILE_COLS))
    return torch.empty(*tiles, 32 * bits, dtype=torch.int32, device=matrix.device)


def _blocks(matrix: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Returns blocks of whole row tiles, with their first rows."""
    step = max(1, pack.BLOCK_ELEMENTS // (TILE_ROWS * matrix.shape[1])) * TILE_ROWS
    return [(start, matrix[start : start + step]) for start in range(0, len(matrix), step)]


def _store(words: torch.Tensor, start: int, values: torch.Tensor, bits: int, fill: int = 0) -> None:
    """Packs rows from `start` on; the rest of the last tiles holds `fill`."""
    rows, cols = values.shape
    padding = (0, -cols % TILE_COLS, 0, -rows % TILE_ROWS)
    padded = functional.pad(values, padding, value=fill)
    first = start // TILE_ROWS
    words[first : first + len(padded) // TILE_ROWS] = pack.pack_values(padded, bits)
