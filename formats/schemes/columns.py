"""Scales and groups of the columns of an `int8` tensor (SPEC.md 7.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


def make_columns(scales: NDArray[np.float32], groups: NDArray[np.uint8] | None) -> Columns:
    """Returns what follows from `X_col_scale`, float32 [cols], and `X_col_group`, uint8 [cols]; values are not looked at."""
    if groups is None:
        return Columns(scales, None, None)
    order = order_of(groups)
    return Columns(scales, order, inverse(order))


def order_of(groups: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Returns int32 [cols]: the columns group by group, within a group as in the source. Every byte is a group."""
    return np.argsort(groups, kind="stable").astype(np.int32)


def inverse(order: NDArray[np.integer[Any]]) -> NDArray[np.intp]:
    """Returns intp [cols]: the place of each number in a permutation."""
    places = np.empty(len(order), np.intp)
    places[order] = np.arange(len(order))
    return places
