"""Scales and order of the columns of an `int8` tensor (SPEC.md 7.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.errors import LayoutError

ORDER = np.dtype("<i4")


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What a tensor knows of its columns.

    Attributes:
        scales: float32 [cols], in the source's order.
        order: int32 [cols]: stored column j holds column order[j] of the source; None where they stand as in the source.
        places: intp [cols]: the stored column that holds each column of the source; None where `order` is.
    """

    scales: NDArray[np.float32]
    order: NDArray[np.int32] | None
    places: NDArray[np.intp] | None


def parse_columns(scales: bytes, order: bytes | None, **where: Any) -> Columns:
    """Reads `X_col_scale`, float32 [cols], and `X_col_order`, int32 [cols]; values of scales are not looked at.

    Raises:
        LayoutError: the order is no permutation of 0 to cols - 1.
    """
    factors = np.frombuffer(scales, "<f4").astype(np.float32, copy=False)
    if order is None:
        return Columns(factors, None, None)
    held = np.frombuffer(order, ORDER).astype(np.int32, copy=False)
    check_order(held, len(factors), **where)
    return Columns(factors, held, inverse(held))


def check_order(order: NDArray[np.integer[Any]], cols: int, **where: Any) -> None:
    """Raises LayoutError where int [cols] `order` is no permutation of 0 to cols - 1."""
    seen = np.zeros(cols, np.bool_)
    seen[order[(order >= 0) & (order < cols)]] = True
    if len(order) != cols or not seen.all():
        missing = f"{len(order)} entries without {int(seen.argmin())}" if not seen.all() else f"{len(order)} entries"
        raise LayoutError("order of columns is no permutation", got=missing, expected=f"0 to {cols - 1}", **where)


def inverse(order: NDArray[np.integer[Any]]) -> NDArray[np.intp]:
    """Returns intp [cols]: the place of each number in a permutation."""
    places = np.empty(len(order), np.intp)
    places[order] = np.arange(len(order))
    return places
