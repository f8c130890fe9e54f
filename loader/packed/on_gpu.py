"""Packs matrices by the kernels of `pack.cu`: the words and exceptions of `pack.py`, fast."""

from __future__ import annotations

import torch
from torch.nn import functional

from codecllm.loader.packed.kernels import has_kernels, kernel_of, packing_source
from codecllm.loader.packed.layout import (
    BF16_BITS,
    INT_BITS,
    TILE_COLS,
    TILE_ROWS,
    best_base,
    best_bits,
    tile_words,
)

_THREADS = 256
_COUNTING_BLOCKS = 528


def packs(matrix: torch.Tensor) -> bool:
    """Whether the kernels pack a matrix [rows, cols]; `pack.py` packs others."""
    fits = matrix.is_contiguous() and matrix.data_ptr() % 16 == 0
    return fits and has_kernels(matrix.device)


def choose_bf16_base(weights: torch.Tensor) -> int:
    """Returns what `pack.choose_bf16_base` does."""
    return best_base(_counted("count_exponents", weights, BF16_BITS, 256))


def choose_int_bits(codes: torch.Tensor) -> int:
    """Returns what `pack.choose_int_bits` does."""
    counts = _counted("count_beyond", codes, 8, 9)
    return best_bits({bits: counts[bits] for bits in INT_BITS}, codes.numel())


def _counted(name: str, matrix: torch.Tensor, bits: int, kinds: int) -> list[int]:
    counts = torch.zeros(kinds, dtype=torch.int64, device=matrix.device)
    kernel = kernel_of(name, packing_source(bits, matrix.element_size()), matrix.device)
    blocks = min(_COUNTING_BLOCKS, -(-matrix.numel() // (16 * _THREADS)))
    kernel.launch(blocks, _THREADS, 0, [matrix, *matrix.shape, counts])
    result: list[int] = counts.tolist()
    return result


def count_exceptions(matrix: torch.Tensor, bits: int, base: int) -> tuple[torch.Tensor, int, int]:
    """Counts the values that the fields cannot express.

    Args:
        matrix: int8 or int16 codes, or bfloat16 weights, [rows, cols].
        bits: of the layout.
        base: of the exponents of bfloat16 weights.

    Returns:
        int32 [rows + 1], where the exceptions of each row begin; their number; most of a row.
    """
    rows, cols = matrix.shape
    counts = torch.empty(rows, dtype=torch.int32, device=matrix.device)
    source = packing_source(bits, matrix.element_size())
    kernel = kernel_of("count_exceptions", source, matrix.device)
    kernel.launch(
        -(-rows // TILE_ROWS),
        _THREADS,
        0,
        [matrix, counts, rows, cols, base],
    )
    first = functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    total, longest = torch.stack((first[-1], counts.max())).tolist()
    return first, total, longest


def pack_rows(
    matrix: torch.Tensor, bits: int, base: int, first: torch.Tensor | None, exceptions: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the words of a matrix, and its exceptions.

    Args:
        matrix: see `count_exceptions`.
        bits: of the layout.
        base: of the exponents of bfloat16 weights.
        first: where the exceptions of each row begin; None: there are none.
        exceptions: their number.

    Returns:
        int32 [row tiles, column tiles, 32 * bits]; int32 [exceptions] or None.
    """
    rows, cols = matrix.shape
    tiles = (-(-rows // TILE_ROWS), -(-cols // TILE_COLS))
    words = torch.empty(*tiles, tile_words(bits), dtype=torch.int32, device=matrix.device)
    entries = words.new_empty(exceptions)
    source = packing_source(bits, matrix.element_size())
    kernel = kernel_of("pack_rows", source, matrix.device)
    # A tensor without elements has the address 0.
    arguments: list[torch.Tensor | int] = [
        matrix,
        words.new_empty(0) if first is None else first,
        words,
        entries,
        rows,
        cols,
        base,
    ]
    kernel.launch(tiles[0], _THREADS, 0, arguments)
    return words, None if first is None else entries
