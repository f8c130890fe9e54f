"""Order-0 entropy of byte symbols: the least that any coder without context can store them in."""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs import native

SAMPLE_STRIDE = 17
_EXACT_UP_TO = 1 << 14


def symbol_counts(symbols: NDArray[np.uint8], stride: int = 1) -> NDArray[np.int64]:
    """Returns int64 [256]: how often each value occurs among symbols.

    Args:
        symbols: uint8 [n].
        stride: only every `stride`-th symbol is counted.

    >>> symbol_counts(np.array([2, 0, 2, 1], np.uint8))[:4].tolist()
    [1, 1, 2, 0]
    """
    if native.core is not None:
        counts = native.core.histogram(np.ascontiguousarray(symbols), stride)
        return np.frombuffer(counts, np.int64)
    return np.bincount(symbols[::stride], minlength=256)


def entropy_bits(symbols: NDArray[np.uint8]) -> float:
    """Returns `n * H` of n symbols in bits, H being the entropy of their own frequencies.

    Args:
        symbols: uint8 [n]; an empty array has 0 bits.

    >>> entropy_bits(np.array([0, 1, 2, 3] * 4, np.uint8))
    32.0
    """
    return counted_entropy_bits(symbol_counts(symbols))


def counted_entropy_bits(counts: NDArray[np.int64]) -> float:
    """Returns `entropy_bits` of symbols that occur int64 [kinds] `counts` times."""
    return _total_bits(counts[counts > 0], int(counts.sum()))


def estimated_entropy_bits(symbols: NDArray[np.uint8]) -> float:
    """Returns an estimate of `entropy_bits` from every 17th symbol; exact up to 16,384 symbols.

    Counting all symbols would take longer than coding them. The sample's entropy is too small by
    (K - 1) / 2n nats for K distinct symbols (Miller 1955), which is added; the rest is about 0.01
    bit per symbol on one chunk and averages out over chunks.
    """
    if symbols.size <= _EXACT_UP_TO:
        return entropy_bits(symbols)
    counts = symbol_counts(symbols, SAMPLE_STRIDE)
    counts = counts[counts > 0]
    sample = int(counts.sum())
    # The correction of Miller for a sample, less that for the whole.
    bias = (len(counts) - 1) / (2 * math.log(2)) * (1 / sample - 1 / symbols.size)
    return min(8.0, _total_bits(counts, sample) / sample + bias) * symbols.size


def prefix_code_bits(counts: NDArray[np.int64]) -> int:
    """Returns the bits of the best code with whole bits per symbol (Huffman 1952).

    The bits above the entropy are no fault of a Huffman coder; an arithmetic coder or ANS does not
    pay them. The lengths themselves, and limits on them, are not counted. A single distinct symbol
    needs no bit.

    Args:
        counts: int64 [kinds]: how often each symbol occurs.

    >>> prefix_code_bits(np.array([4, 2, 1, 1]))
    14
    """
    heap = counts[counts > 0].tolist()
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        # Each merge adds a bit to every symbol below it.
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        bits += pair
        heapq.heappush(heap, pair)
    return bits


def counts_entropy_bits(counts: NDArray[np.int64]) -> float:
    """Returns `n * H` in bits of symbols of the given counts, n being their sum."""
    return _total_bits(counts[counts > 0], int(counts.sum()))


def _total_bits(counts: NDArray[np.int64], total: int) -> float:
    if total == 0:
        return 0.0
    return max(0.0, float(total * math.log2(total) - (counts * np.log2(counts)).sum()))
