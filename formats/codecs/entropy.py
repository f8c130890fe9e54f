"""Order-0 entropy of byte symbols: the least that any coder without context can store them in."""

from __future__ import annotations

import heapq
import math
from typing import Any

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

    Examples:
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

    Examples:
        >>> entropy_bits(np.array([0, 1, 2, 3] * 4, np.uint8))
        32.0
    """
    return counted_entropy_bits(symbol_counts(symbols))


def counted_entropy_bits(counts: NDArray[np.int64]) -> float:
    """Returns `entropy_bits` of symbols that occur int64 [kinds] `counts` times."""
    total = int(counts.sum())
    counts = counts[counts > 0]
    if not total:
        return 0.0
    return max(0.0, float(total * math.log2(total) - (counts * np.log2(counts)).sum()))


def sample_counts(symbols: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Returns `symbol_counts` of every 17th symbol; of all where there are at most 16,384."""
    return symbol_counts(symbols, 1 if symbols.size <= _EXACT_UP_TO else SAMPLE_STRIDE)


def estimated_entropy_bits(symbols: NDArray[np.uint8]) -> float:
    """Returns an estimate of `entropy_bits` from `sample_counts`.

    Counting all symbols would take longer than coding them. The sample's entropy is too small by
    (K - 1) / 2n nats for K distinct symbols (Miller 1955), which is added; the rest is about 0.01
    bit per symbol on one chunk and averages out over chunks.
    """
    return float(entropies_by_counts(sample_counts(symbols)[None, :], np.array([symbols.size]))[0])


def entropies_by_counts(counts: NDArray[Any], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns float64 [chunks]: the entropy of each chunk in bits, or its estimate.

    Args:
        counts: [chunks, 256], `symbol_counts` or `sample_counts` of each.
        sizes: int64 [chunks]: the symbols of each, counted or not.
    """
    numbers = counts.astype(np.float64)
    totals = numbers.sum(axis=1)
    some = np.maximum(totals, 1)
    logarithms = np.log2(np.maximum(numbers, 1))
    bits = some * np.log2(some) - (numbers * logarithms).sum(axis=1)
    # The correction of Miller for a sample, less that for the whole; none where all are counted.
    kinds = np.count_nonzero(counts, axis=1)
    shares = 1 / some - 1 / np.maximum(sizes, 1)
    bias = (kinds - 1) / (2 * math.log(2)) * shares
    sampled = totals < sizes
    estimates = np.minimum(8.0, bits / some + bias) * sizes
    entropies: NDArray[np.float64] = np.maximum(0.0, np.where(sampled, estimates, bits))
    return entropies


def prefix_code_bits(counts: NDArray[np.int64]) -> int:
    """Returns the bits of the best code with whole bits per symbol (Huffman 1952).

    The bits above the entropy are no fault of a Huffman coder; an arithmetic coder or ANS does not
    pay them. The lengths themselves, and limits on them, are not counted. A single distinct symbol
    needs no bit.

    Args:
        counts: int64 [kinds]: how often each symbol occurs.

    Examples:
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
