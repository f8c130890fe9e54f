"""Cuts codes of 16 bits into the two planes of a wide tensor (SPEC.md 7.3).

Low bits are as good as random and cost their number; the high rest has few symbols and a short
code table. Where a few codes among many leave a byte, though, a high plane that is zero but for
these is cheaper. The encoder tries both.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import lt

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs import rans
from codecllm.formats.codecs.rans_fit import coded_bytes, fit_table
from codecllm.formats.codecs.rans_table import pack_table
from codecllm.formats.codecs.zstd import ZstdCodec
from codecllm.formats.schemes.int8 import MAX_CODE, split_codes
from codecllm.formats.shards.chunk_table import MAX_LOW_BITS, slot_bytes

LEAST_LOW_BITS = 3
"""Fewer would make runs in the low plane, which the codec `zstd` takes for strings."""

_ZSTD = ZstdCodec()


def choose_low_bits(bands: list[list[NDArray[np.int16]]], codec: str) -> list[int]:
    """Returns the number of low bits of each tile: 3 to 8, row of tiles by row of tiles.

    Tried are the fewest with which every high part fits a byte, 7 and 8. Codes that fit a byte as
    they are keep it whole. With codec `rans` tiles that stand one above the other share frequency
    tables, and so this.

    Args:
        bands: rows of tiles, int16 [rows, cols] each.
        codec: the codec that packs them.
    """
    if codec != rans.NAME:
        return [_choose([tile], _packed) for band in bands for tile in band]
    return [_choose(list(column), _coded) for column in zip(*bands, strict=True)] * len(bands)


def _choose(
    tiles: list[NDArray[np.int16]], measure: Callable[[list[NDArray[np.int16]], int], int]
) -> int:
    lowest, highest = min(int(tile.min()) for tile in tiles), max(int(tile.max()) for tile in tiles)
    # The low plane holds whole codes, and a high plane of zeros costs next to nothing.
    if lowest >= -MAX_CODE and highest <= MAX_CODE:
        return MAX_LOW_BITS
    fewest = next(
        bits for bits in range(LEAST_LOW_BITS, MAX_LOW_BITS + 1) if _fit(lowest, highest, bits)
    )
    candidate_bits = sorted({fewest, max(fewest, MAX_LOW_BITS - 1), MAX_LOW_BITS})
    return min(candidate_bits, key=lambda bits: measure(tiles, bits))


def halves(tile: NDArray[np.int16], low_bits: int) -> list[NDArray[np.uint8]]:
    """Returns the symbols of both planes of a tile, uint8 [rows * cols]."""
    return [half.reshape(-1).view(np.uint8) for half in split_codes(tile, low_bits)]


def _fit(lowest: int, highest: int, low_bits: int) -> bool:
    """Whether the high parts of all codes from `lowest` to `highest` lie in [-127, 127]."""
    half = 1 << (low_bits - 1)
    return (lowest + half) >> low_bits >= -MAX_CODE and (highest + half) >> low_bits <= MAX_CODE


def _packed(tiles: list[NDArray[np.int16]], low_bits: int) -> int:
    """Bytes of the slots of tiles that share nothing."""
    symbol_planes = (half for tile in tiles for half in halves(tile, low_bits))
    return sum(slot_bytes(min(len(_ZSTD.encode(half)), half.size)) for half in symbol_planes)


def _coded(tiles: list[NDArray[np.int16]], low_bits: int) -> int:
    """Bytes of the slots of tiles and of the frequency tables that they share."""
    total = 0
    for plane in zip(*(halves(tile, low_bits) for tile in tiles), strict=True):
        counts = [np.bincount(half, minlength=256) for half in plane]
        table = fit_table(np.sum(counts, axis=0))
        sizes = [coded_bytes(table, chunk_counts) for chunk_counts in counts]
        raw = [half.size for half in plane]
        total += sum(map(slot_bytes, map(min, sizes, raw)))
        if any(map(lt, sizes, raw)):
            total += len(pack_table(table))
    return total
