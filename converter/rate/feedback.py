"""Error feedback: each column of codes makes up for the rounding of the columns before it.

An error e[c] = w[c] - code[c] * step[c] of a row's weights changes its output by e x, by e H e^T in
the square over all tokens seen, H = X^T X. Write H = V V^T with an upper triangular V: then e H e^T
= |e V|^2, column by column, and column c of it, V[c, c] * (e[c] + sum over i < c of e[i] * V[i, c]
/ V[c, c]), is smallest if c is rounded as if its weight were

    w[c] + sum over i < c of e[i] * V[i, c] / V[c, c]

That is the order of GPTQ, without an inverse. Columns with large H[c, c] come first, while there is
most to correct with. The products of pairs of inputs in a short text are noise in part:
off-diagonal elements are shrunk, the more the fewer tokens were seen (docs/bits.md), and a share of
the mean diagonal is added to it.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.encode.quantize import as_float32, round_toward_zero
from codecllm.converter.plan.params import WIDE_CODES, QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.rate.products import Sums
from codecllm.formats.manifest.records import FEEDBACK, FEEDBACK_DEADZONE

RIDGE = 0.01
"""Share of the mean diagonal that is added to it."""

FARTHEST = 1.5
"""Largest distance of a row of codes from the weights that feedback is followed to.

In units of the distance of zeros. A row of a code or less a weight may gain by more than 1.
"""

_SHRINKAGE, _SHRINKAGE_TOKENS = 0.2, 16384

_PANEL = 64
_GROUP_ROWS, _GROUP_ELEMENTS = 1024, 1 << 22


def shrinkage(tokens: int) -> float:
    """Returns the share by which products of two different inputs are lessened.

    Examples:
        >>> shrinkage(16384)
        0.2
        >>> shrinkage(4096)
        0.4
    """
    return min(1.0, _SHRINKAGE * math.sqrt(_SHRINKAGE_TOKENS / max(1, tokens)))


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """How errors of columns are fed into later ones.

    Attributes:
        order: int64 [cols]: the columns, first to last.
        ratios: float32 [cols, cols]: share of the i-th column's error that is added to the j-th, i
            < j, in row j. The other elements are undefined.
    """

    order: NDArray[np.int64]
    ratios: NDArray[np.float32]


def factor_of(products: NDArray[np.floating], shrunk: float) -> Factor:
    """Factors X^T X.

    Args:
        products: [cols, cols], symmetric, diagonal >= 0 and not 0 everywhere, all finite.
        shrunk: share by which off-diagonal elements are lessened, above 0.
    """
    diagonal = products.diagonal().astype(np.float64)
    # Stable, so that equal elements have one order on every machine.
    order = np.argsort(-diagonal, kind="stable")
    backward = order[
        ::-1
    ]  # the lower triangular factor in backward order is the upper one in order
    matrix = products[np.ix_(backward, backward)].astype(np.float64)
    matrix *= 1 - shrunk
    np.fill_diagonal(matrix, diagonal[backward] + RIDGE * diagonal.mean())
    lower = np.linalg.cholesky(matrix)
    lower /= lower.diagonal().copy()
    return Factor(order, np.ascontiguousarray(lower[::-1, ::-1].T, np.float32))


def refined_codes(
    weights: NDArray[np.float32],
    scales: tuple[NDArray[np.float32], NDArray[np.float32] | None],
    factor: Factor,
    deadzone: float = 0.0,
    limits: tuple[int, int] = WIDE_CODES,
) -> NDArray[np.int16]:
    """Quantizes rows with error feedback; they do not depend on one another.

    Where few inputs were seen, feedback may lead far from the weights. A row that it would leave
    much farther from them than zeros are (`FARTHEST`) is rounded without it.

    Args:
        weights: float32 [rows, cols], finite.
        scales: float32 [rows], and factors of the columns, float32 [cols], or None.
        factor: of the inputs.
        deadzone: as in `QuantParams`.
        limits: the smallest and the largest code that there may be.

    Returns:
        int16 [rows, cols], the codes.
    """
    rows, cols = weights.shape
    order, ratios = factor.order, factor.ratios
    col_scales = np.ones(cols, np.float32) if scales[1] is None else scales[1][order]
    weights_by_column = np.ascontiguousarray(weights[:, order].T)
    errors, codes = np.empty_like(weights_by_column), np.empty((cols, rows), np.int16)
    step, rounded_codes = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for first in range(0, cols, _PANEL):
        last = min(first + _PANEL, cols)
        panel = weights_by_column[first:last].copy()
        if first:
            # One matrix product serves all earlier panels; inside a panel each column needs the one
            # before.
            panel += ratios[first:last, :first] @ errors[:first]
        for col in range(first, last):
            quotient = panel[col - first]
            if col > first:
                quotient += ratios[col, first:col] @ errors[first:col]
            np.multiply(scales[0], col_scales[col], out=step)
            np.divide(quotient, step, out=quotient)
            if deadzone:
                round_toward_zero(quotient, deadzone, rounded_codes)
            else:
                np.rint(quotient, out=rounded_codes)
            # A code that has no more room feeds its whole error on.
            np.maximum(rounded_codes, limits[0], out=rounded_codes)
            np.minimum(rounded_codes, limits[1], out=rounded_codes)
            codes[col] = rounded_codes
            np.multiply(rounded_codes, step, out=rounded_codes)
            np.subtract(weights_by_column[col], rounded_codes, out=errors[col])
    far = _squares(errors) > FARTHEST**2 * _squares(weights_by_column)
    if far.any():
        quotients = weights_by_column[:, far] / (scales[0][far] * col_scales[:, None])
        nearest = np.empty_like(quotients)
        round_toward_zero(quotients, deadzone, nearest)
        codes[:, far] = nearest.clip(*limits)
    result = np.empty((rows, cols), np.int16)
    result[:, order] = codes.T
    return result


def _squares(by_column: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns the sum of squares of each row, float64 [rows], of float32 [cols, rows]."""
    squares: NDArray[np.float64] = np.einsum("cr,cr->r", by_column, by_column, dtype=np.float64)
    return squares


class Feedback:
    """Refines the codes of tensors whose inputs are known. May be used by several threads."""

    def __init__(self, products: Sums) -> None:
        """Takes over the sums, for good.

        Each is replaced by its factor, where it lies, when that is needed first.
        """
        self._products = products
        self._orders: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: object) -> bool:
        """Whether a tensor's codes can be refined."""
        return name in self._products

    def refine(self, plan: TensorPlan, params: QuantParams) -> QuantParams:
        """Returns steps whose codes are chosen with feedback.

        The same ones, where the inputs are not known.
        """
        if plan.source.name not in self or plan.kind != "row":
            return params
        rounding = FEEDBACK_DEADZONE if params.deadzone else FEEDBACK
        return replace(params, refined=rounding, codes=_Codes(self, plan, params))

    def factor(self, name: str) -> Factor:
        """Returns the factor of a tensor's inputs, `ratios` a view of the file."""
        number = self._products.number(name)
        matrix = self._products.matrix(number)
        with self._lock:  # one at a time: it takes several times the room of the matrix
            if number not in self._orders:
                new_factor = factor_of(matrix, shrinkage(self._products.tokens(number)))
                matrix[...] = new_factor.ratios
                self._orders[number] = new_factor.order
        return Factor(self._orders[number], matrix)

    def group_rows(self, cols: int) -> int:
        """Returns how many rows of `cols` weights are quantized at a time."""
        return max(1, min(_GROUP_ROWS, _GROUP_ELEMENTS // cols))

    def quantize(self, plan: TensorPlan, params: QuantParams, start: int, stop: int) -> Any:
        """Returns the codes of rows [start, stop): what `taken` makes int16 arrays of."""
        source, cols = plan.source, plan.matrix[1]
        words = source.read_elements(start * cols, stop * cols).reshape(stop - start, cols)
        weights = as_float32(words, source.dtype.name, np.empty(words.shape, np.float32))
        scales = params.row_scale[start:stop], params.col_scale
        factor = self.factor(source.name)
        return refined_codes(weights, scales, factor, params.deadzone, params.limits)

    def taken(self, codes: Any, rows: slice) -> NDArray[np.int16]:
        """Returns some rows of what `quantize` gave, int16 [rows, cols]."""
        result: NDArray[np.int16] = codes[rows]
        return result


@dataclass(slots=True, eq=False)
class _Group:
    """Some rows in flight: their codes once they are known, and the number still to be taken."""

    waiting: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    codes: Any = None


class _Codes:
    """`QuantParams.codes` of one tensor.

    Rows are quantized in groups that begin at multiples of a number which follows from `cols`
    alone, always a whole group at a time, so that codes depend neither on the number of rows of a
    call nor on the calling thread. A group is kept until all its rows have been taken.
    """

    def __init__(self, feedback: Feedback, plan: TensorPlan, params: QuantParams) -> None:
        self._feedback, self._plan, self._params = feedback, plan, params
        self._rows = feedback.group_rows(plan.matrix[1])
        self._groups: dict[int, _Group] = {}
        self._lock = threading.Lock()

    def __call__(self, first: int, last: int) -> NDArray[np.int16]:
        parts = []
        for number in range(first // self._rows, -(-last // self._rows)):
            start = number * self._rows
            stop = min(start + self._rows, self._plan.matrix[0])
            rows_here = slice(max(first, start) - start, min(last, stop) - start)
            codes = self._group(number, start, stop, rows_here.stop - rows_here.start)
            parts.append(self._feedback.taken(codes, rows_here))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _group(self, number: int, start: int, stop: int, taken_rows: int) -> Any:
        with self._lock:
            group = self._groups.setdefault(number, _Group(stop - start))
            group.waiting -= taken_rows
            if group.waiting <= 0:
                self._groups.pop(number, None)
        # The first thread quantizes the group; others that need its rows wait here.
        with group.lock:
            if group.codes is None:
                group.codes = self._feedback.quantize(self._plan, self._params, start, stop)
        return group.codes
