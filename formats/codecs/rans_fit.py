"""Fits a frequency table to counted symbols, in integers, so that every machine fits the same.

A symbol of frequency f under precision n costs n - log2(f) bits. Frequencies begin at the counts'
share, rounded down and at least 1; the difference to 2^n then goes, unit by unit, to the symbol
that gains most or from the one that loses least.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs import native
from codecllm.formats.codecs.rans_reference import STATE_BYTES
from codecllm.formats.codecs.rans_table import MAX_PRECISION, MIN_PRECISION, FrequencyTable

_COST_BITS = 16  # costs are counted in units of 2^-16 bit
# Rounded to 2^-16: differences in the last bit between machines vanish.
LOG2 = np.rint(
    np.log2(np.maximum(np.arange((1 << MAX_PRECISION) + 2), 1)) * (1 << _COST_BITS)
).astype(np.int64)
"""int64: rint(2^16 * log2(n)) for n from 0 (where it is 0) to 2^14 + 1."""
# A lower precision has a smaller table: it may cost 1/256 bit a symbol more than the highest.
_TOLERANCE = (1 << _COST_BITS) // 256


def fit_table(counts: NDArray[np.int64]) -> FrequencyTable:
    """Returns the table for symbols that occur int64 [256] `counts` times, at least one of them."""
    counts = np.ascontiguousarray(counts, np.int64)
    if native.core is not None:
        precision, frequencies = native.core.rans_fit(counts, LOG2)
        return FrequencyTable(precision, np.frombuffer(frequencies, np.uint16).astype(np.int64))
    return fit_table_plainly(counts)


def fit_table_plainly(counts: NDArray[np.int64]) -> FrequencyTable:
    """As `fit_table`, without the native core."""
    tables = [
        FrequencyTable(n, fit_frequencies(counts, n))
        for n in range(MIN_PRECISION, MAX_PRECISION + 1)
    ]
    costs = [_cost(table, counts) for table in tables]
    enough = costs[-1] + _TOLERANCE * int(counts.sum())
    return next(table for table, cost in zip(tables, costs, strict=True) if cost <= enough)


def coded_bits(table: FrequencyTable, counts: NDArray[np.int64]) -> int:
    """Returns the cost in bits, rounded down, of int64 [256] counts; the table must hold them."""
    return _cost(table, counts) >> _COST_BITS


def coded_bytes(table: FrequencyTable, counts: NDArray[np.int64]) -> int:
    """Returns the expected stored bytes of a chunk of such symbols: states and `coded_bits`."""
    return STATE_BYTES + -(-coded_bits(table, counts) // 8)


def _cost(table: FrequencyTable, counts: NDArray[np.int64]) -> int:
    present = np.flatnonzero(counts)
    price = (table.precision << _COST_BITS) - LOG2[table.frequencies[present]]
    return int((counts[present] * price).sum())


def fit_frequencies(counts: NDArray[np.int64], precision: int) -> NDArray[np.int64]:
    """Returns int64 [256] frequencies of sum 2^precision, 1 or more for each symbol present."""
    total = 1 << precision
    shares = counts * total // int(counts.sum())
    frequencies = np.where(counts > 0, np.maximum(shares, 1), 0)
    missing = total - int(frequencies.sum())
    if missing > 0:
        _move(frequencies, counts, missing, 1)
    elif missing < 0:
        _move(frequencies, counts, -missing, -1)
    return frequencies


def _move(frequencies: NDArray[np.int64], counts: NDArray[np.int64], units: int, step: int) -> None:
    """Adds `step` (1 or -1) `units` times where it costs least; ties go to the smaller symbol."""
    heap = [
        entry
        for symbol in np.flatnonzero(counts).tolist()
        if (entry := _offer(frequencies, counts, symbol, step)) is not None
    ]
    heapq.heapify(heap)
    for _ in range(units):
        _, symbol = heapq.heappop(heap)
        frequencies[symbol] += step
        entry = _offer(frequencies, counts, symbol, step)
        if entry is not None:
            heapq.heappush(heap, entry)


def _offer(
    frequencies: NDArray[np.int64], counts: NDArray[np.int64], symbol: int, step: int
) -> tuple[int, int] | None:
    """Returns (cost of the step, symbol), or None where the frequency would become 0."""
    now = int(frequencies[symbol])
    if now + step < 1:
        return None
    return int(counts[symbol]) * int(LOG2[now] - LOG2[now + step]), symbol
