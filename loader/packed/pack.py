"""Packs matrices on their own device, with torch: the words of `layout.pack_values`, fast."""

from __future__ import annotations

import torch

from codecllm.loader.packed.layout import (
    BF16_EXPONENTS,
    INT_BITS,
    LANES,
    TILE_COLS,
    TILE_ROWS,
    Plane,
    best_base,
    best_bits,
    planes_of,
    tile_words,
)

BLOCK_ELEMENTS = 1 << 22
"""Elements packed at once: the intermediates take 8 bytes each."""


def pack_values(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs values below 2^bits.

    Args:
        values: integers [rows, cols]; both multiples of the tile's.
        bits: bits of each value.

    Returns:
        int32 [row tiles, column tiles, words of a tile].
    """
    rows, cols = values.shape
    tiles = (rows // TILE_ROWS, cols // TILE_COLS)
    words = torch.empty(*tiles, tile_words(bits), dtype=torch.int32, device=values.device)
    step = max(1, BLOCK_ELEMENTS // max(1, TILE_ROWS * cols))
    for first in range(0, tiles[0], step):
        last = min(first + step, tiles[0])
        block = values[first * TILE_ROWS : last * TILE_ROWS]
        _pack_block(_by_register(block), bits, words[first:last])
    return words


def _by_register(values: torch.Tensor) -> torch.Tensor:
    """Returns int64 [row tiles, column tiles, lane, step, register, half]."""
    rows, cols = values.shape
    parts = values.view(rows // TILE_ROWS, 2, 8, cols // TILE_COLS, 4, 4, 2, 2)
    # row tile, i, g, column tile, t, s, j, h -> row tile, column tile, (g, t), s, (j, i), h
    parts = parts.permute(0, 3, 2, 4, 5, 6, 1, 7).to(torch.int64)
    return parts.reshape(rows // TILE_ROWS, cols // TILE_COLS, LANES, 4, 4, 2)


def _pack_block(registers: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    start = 0
    for plane in planes_of(bits):
        first = _first_bits(plane).to(registers.device)
        shifted = torch.zeros_like(registers)
        for part in plane.parts:
            fields = (registers >> (plane.low + part.low)) & ((1 << part.width) - 1)
            shifted |= fields << (first + part.away) % 32
        if plane.width == 8:
            lane_words = shifted.unflatten(4, (2, 2)).sum((5, 6)).flatten(3, 4)
        else:
            lane_words = shifted.sum((4, 5)).unflatten(3, (plane.words, -1)).sum(4)
        adjacent = min(plane.words, 4)
        # lane, word -> word / adjacent, lane, word % adjacent
        ordered = lane_words.unflatten(3, (-1, adjacent)).transpose(2, 3).flatten(2)
        size = plane.words * LANES
        out[:, :, start : start + size] = ordered.to(torch.int32)
        start += size


def _first_bits(plane: Plane) -> torch.Tensor:
    """Returns int64 [step, register, half]: the bit of a word at which a field begins."""
    places = [
        [[plane.place(step, register, half)[1] for half in range(2)] for register in range(4)]
        for step in range(4)
    ]
    return torch.tensor(places)


def unpack_values(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the values of `pack_values`: int32 [rows, cols]."""
    row_tiles, col_tiles = words.shape[:2]
    shape = (row_tiles, col_tiles, LANES, 4, 4, 2)
    registers = torch.zeros(shape, dtype=torch.int64, device=words.device)
    start = 0
    for plane in planes_of(bits):
        size = plane.words * LANES
        adjacent = min(plane.words, 4)
        lane_words = words[:, :, start : start + size].to(torch.int64) & 0xFFFFFFFF
        lane_words = lane_words.unflatten(2, (-1, LANES, adjacent)).transpose(2, 3).flatten(3)
        for step in range(4):
            for register in range(4):
                for half in range(2):
                    word, bit = plane.place(step, register, half)
                    for part in plane.parts:
                        field = lane_words[..., word] >> (bit + part.away) % 32
                        field &= (1 << part.width) - 1
                        registers[..., step, register, half] |= field << (plane.low + part.low)
        start += size
    parts = registers.view(row_tiles, col_tiles, 8, 4, 4, 2, 2, 2)
    # row tile, column tile, g, t, s, j, i, h -> row tile, i, g, column tile, t, s, j, h
    parts = parts.permute(0, 6, 2, 1, 3, 4, 5, 7)
    return parts.reshape(row_tiles * TILE_ROWS, col_tiles * TILE_COLS).to(torch.int32)


def choose_bf16_base(weights: torch.Tensor) -> int:
    """Returns the base exponent of weights (`layout.best_base`).

    Args:
        weights: bfloat16 of any shape.
    """
    pattern = weights.view(torch.int16).flatten()
    counts = torch.zeros(256, dtype=torch.int64, device=weights.device)
    for block in pattern.split(1 << 26):
        bits = block.to(torch.int32)
        exponents = (bits >> 7 & 0xFF)[(bits & 0x7FFF) != 0]
        counts += torch.bincount(exponents, minlength=256)
    return best_base(counts.tolist())


def split_bf16(weights: torch.Tensor, base: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int32 values of 12 bits and a mask of exceptions, as `layout.split_bf16` does."""
    bits = weights.view(torch.int16).to(torch.int32) & 0xFFFF
    exponent = (bits >> 7 & 0xFF) - base
    is_zero = (bits & 0x7FFF) == 0
    fits = is_zero | ((exponent >= 1) & (exponent <= BF16_EXPONENTS))
    field = torch.where(is_zero, 0, exponent) & 0xF
    values = (bits & 0x7F) | field << 7 | bits >> 15 << 11
    return torch.where(fits, values, 0), ~fits


def join_bf16(values: torch.Tensor, base: int) -> torch.Tensor:
    """Returns bfloat16 weights; exceptions become zero."""
    field = values >> 7 & 0xF
    exponent = torch.where(field == 0, 0, field + base)
    pattern = values >> 11 << 15 | exponent << 7 | (values & 0x7F)
    return pattern.to(torch.int16).view(torch.bfloat16)


def choose_int_bits(codes: torch.Tensor) -> int:
    """Returns the number of bits with the fewest bytes, as `layout.best_int_bits` does."""
    counts = torch.zeros(9, dtype=torch.int64, device=codes.device)
    for block in codes.flatten().split(1 << 26):
        wide = block.to(torch.int32)
        magnitude = torch.where(wide < 0, ~wide, wide)
        for bits in INT_BITS:
            counts[bits] += (magnitude >= (1 << (bits - 1))).sum()
    outside = counts.tolist()
    return best_bits({bits: outside[bits] for bits in INT_BITS}, codes.numel())
