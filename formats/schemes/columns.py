"""Scales and groups of the columns of an `int8` tensor (SPEC.md 7.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Scales and order of the columns of a tensor.

    Attributes:
        scales: float32 [cols], in the source's order.
        order: int32 [cols]: stored column j holds column order[j] of the source; None where they
            stand as in the source.
        places: intp [cols]: the stored column that holds each column of the source; None where
            `order` is.
    """

    scales: NDArray[np.float32]
    order: NDArray[np.int32] | None
    places: NDArray[np.intp] | None


def make_columns(scales: NDArray[np.float32], groups: NDArray[np.uint8] | None) -> Columns:
    """Returns the columns of a tensor from its side tensors; values are not checked.

    Args:
        scales: `X_col_scale` as float32 [cols].
        groups: `X_col_group`, uint8 [cols]; None where columns are stored as in the source.

    Examples:
        >>> columns = make_columns(np.ones(4, np.float32), np.array([1, 0, 1, 0], np.uint8))
        >>> columns.order.tolist(), columns.places.tolist()
        ([1, 3, 0, 2], [2, 0, 3, 1])
    """
    if groups is None:
        return Columns(scales, None, None)
    order = order_of(groups)
    return Columns(scales, order, inverse(order))


def order_of(groups: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Returns int32 [cols]: the columns group by group, within a group as in the source.

    Every value 0 to 255 is a valid group.

    Examples:
        >>> order_of(np.array([1, 0, 1, 0, 0], np.uint8)).tolist()
        [1, 3, 4, 0, 2]
    """
    # A stable sort keeps columns of one group as in the source.
    return np.argsort(groups, kind="stable").astype(np.int32)


def inverse(order: NDArray[np.integer[Any]]) -> NDArray[np.intp]:
    """Returns intp [cols]: the place of each number in a permutation.

    Examples:
        >>> inverse(np.array([1, 3, 4, 0, 2])).tolist()
        [3, 0, 4, 1, 2]
    """
    places = np.empty(len(order), np.intp)
    places[order] = np.arange(len(order))
    return places
