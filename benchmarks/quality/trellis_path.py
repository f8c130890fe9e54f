"""The trellis of `trellis.c`, compiled at first use and called with numpy arrays."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.rate.feedback import Factor

STATES = 8
RATE_PRICE = 0.32
"""Squared half steps that one bit is worth in the choice of a path."""

_PANEL = 32


@cache
def _library() -> Any:
    """Returns the compiled C; `cc` must be there."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "trellis.so"
        source = Path(__file__).with_name("trellis.c")
        flags = ["-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", target, source, "-lm"], check=True)
        library = ctypes.CDLL(str(target))
    library.trellis_path.restype = ctypes.c_double
    return library


def price_of(squares: NDArray[np.floating] | float) -> NDArray[np.float32]:
    """Returns the price of n^2 for Gaussian values of these mean squares, in half steps."""
    price = RATE_PRICE * np.log2(np.e) / (2 * np.maximum(squares, 1e-3))
    return np.asarray(price, np.float32)


def path(
    values: NDArray[np.float32], price: float
) -> tuple[NDArray[np.int32], NDArray[np.uint8], float]:
    """Returns codes and cosets of one path, both [n], and its cost.

    Args:
        values: float32 [n], in half steps.
        price: what n^2 costs beside the squared error.
    """
    size = len(values)
    values = np.ascontiguousarray(values)
    codes, coset = np.empty(size, np.int32), np.empty(size, np.uint8)
    best, origin = np.empty(size * STATES, np.int32), np.empty(size * STATES, np.uint8)
    arrays = map(_pointer, (codes, coset, best, origin))
    cost = _library().trellis_path(
        _pointer(values), ctypes.c_long(size), ctypes.c_float(price), *arrays
    )
    return codes, coset, float(cost)


def with_last_bits(symbols: NDArray[np.int8]) -> NDArray[np.int8]:
    """Returns the codes of symbols, both [rows, cols], whose paths run down the columns."""
    rows, cols = symbols.shape
    symbols = np.ascontiguousarray(symbols)
    codes = np.empty_like(symbols)
    state = np.zeros(cols, np.uint8)
    sizes = (ctypes.c_long(rows), ctypes.c_long(cols))
    _library().trellis_last_bits(*map(_pointer, (symbols, codes, state)), *sizes)
    return codes


def matrix_codes(
    weights: NDArray[np.float32],
    steps: tuple[NDArray[np.float32], NDArray[np.float32]],
    factor: Factor | None,
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Returns codes and cosets of a matrix, both [rows, cols]: a path down each column.

    Args:
        weights: float32 [rows, cols].
        steps: half steps of rows and factors of columns, float32.
        factor: how errors of columns are fed into later ones, or None.
    """
    rows, cols = weights.shape
    order = np.arange(cols) if factor is None else factor.order
    ratios = np.zeros((cols, cols), np.float32) if factor is None else np.tril(factor.ratios, -1)
    row_steps, col_steps = np.ascontiguousarray(steps[0]), np.ascontiguousarray(steps[1][order])
    by_column = np.ascontiguousarray(weights[:, order].T)
    prices = price_of(((by_column / (row_steps * col_steps[:, None])) ** 2).mean(1))
    errors = np.empty_like(by_column)
    codes, coset = np.empty((cols, rows), np.int32), np.empty((cols, rows), np.uint8)
    for first in range(0, cols, _PANEL):
        last = min(first + _PANEL, cols)
        panel = by_column[first:last] + ratios[first:last, :first] @ errors[:first]
        inner = np.ascontiguousarray(ratios[first:last, first:last])
        arrays = (panel, by_column[first:last], inner, errors[first:last], row_steps)
        results = (col_steps[first:last], prices[first:last], codes[first:last], coset[first:last])
        sizes = (ctypes.c_long(last - first), ctypes.c_long(rows))
        if not _library().trellis_panel(*map(_pointer, (*arrays, *results)), *sizes):
            raise MemoryError("no room for a path")
    ordered_codes, ordered_coset = (
        np.empty((rows, cols), np.int32),
        np.empty((rows, cols), np.uint8),
    )
    ordered_codes[:, order], ordered_coset[:, order] = codes.T, coset.T
    return ordered_codes, ordered_coset


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
