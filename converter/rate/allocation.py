"""Allocation of bits: relative steps of the rows and columns of a tensor, and of tensors.

Entropy-coded uniform steps spend their bits best where every element adds the same expected harm,
and the harm of an element is the mean square of the loss's gradient there, F[r, c], times its step
squared. So the step wants to be proportional to F[r, c]^-1/2. F is known from few tokens only, as
its sums over rows and columns: F[r, c] ~ rows[r] * cols[c] / sum. Sums over a row are the less
certain ones, and a row whose weights are large is sensitive to large errors only. The best rule at
equal bits (docs/bits.md) is the geometric mean of the two:

    step[r, c] = k * level^1/2 * rows[r]^-1/4 * rms[r]^1/2 * cols[c]^-1/2

where rms[r] is the root mean square of the row's weights, rows and cols have geometric mean 1, and
`level` is the tensor's mean log step of F^-1/2. So the mean log step of a tensor lies halfway
between what gradients ask for and what its weights ask for: gradients alone serve some models well
and others badly. One number k sets the rate of the whole model. Where columns may have no scales,
F[r, c] is taken as its mean over the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ROW_DAMPING = 0.1
COLUMN_DAMPING = 0.1
"""Share of the mean that is added to the sums of rows and columns: few tokens say little of inputs
that they hardly used.
"""

LEVEL_POWER = 0.5
"""Share of the gradients in the mean log step of a tensor; the root mean square of its weights has
the rest.
"""

# Rows are treated as if their root mean square were at least this share of the tensor's.
_MIN_RMS = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """Sensitivities of one tensor, seen as a matrix of its leading dimensions x its last one.

    Attributes:
        cols: float [cols], >= 0: mean squared gradient summed over rows; or mean squared input,
            where `rows` is None.
        rows: float [rows], >= 0: mean squared gradient summed over columns; None where only the
            inputs were seen.
    """

    cols: NDArray[np.floating]
    rows: NDArray[np.floating] | None = None


Statistics = Mapping[str, Sensitivity]
"""Sensitivities by the names of the source's tensors. A tensor may be missing."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Relative steps of a tensor but for its weights.

    With gradients step = level^p * typical^(1 - p) * rows * (rms / typical)^power * cols, where
    `typical` is the geometric mean of the rms of rows and p is `LEVEL_POWER`.

    Attributes:
        rows: float64 [rows].
        cols: float64 [cols].
        power: of the root mean square of the row's weights.
        absolute: whether `level` compares with that of other tensors: it is known from gradients.
        level: geometric mean of the steps that gradients ask for.
    """

    rows: Floats
    cols: Floats
    power: float
    absolute: bool
    level: float

    @property
    def by_column(self) -> bool:
        """Whether columns have factors."""
        return bool((self.cols != 1).any())


def factors_of(
    sensitivity: Sensitivity | None, rows: int, cols: int, *, column_scales: bool = True
) -> Factors:
    """Returns the relative steps of a matrix of `rows` x `cols` weights.

    Without a sensitivity every row's is its rms.

    Args:
        sensitivity: of the matrix, or None.
        rows: of the matrix.
        cols: of the matrix.
        column_scales: whether columns may have factors.
    """
    # Statistics of another shape belong to another layout: then the weights alone decide.
    if sensitivity is None or not _usable(sensitivity.cols, cols):
        return Factors(np.ones(rows), np.ones(cols), 1.0, False, 1.0)
    col_sums = _damped(sensitivity.cols, COLUMN_DAMPING)
    if column_scales:
        col_factors = _normalised(col_sums**-0.5)
    else:
        # The harm of a step that a whole row shares is that of its mean sensitivity.
        col_sums = np.full(cols, col_sums.mean())
        col_factors = np.ones(cols)
    if sensitivity.rows is None or not _usable(sensitivity.rows, rows):
        return Factors(np.ones(rows), col_factors, 1.0, False, 1.0)
    row_sums = _damped(sensitivity.rows, ROW_DAMPING)
    total = float(np.asarray(sensitivity.cols, np.float64).sum())
    # The factors have mean log 0: the level alone compares the tensor with others.
    level = float(np.exp(0.5 * (np.log(total) - np.log(col_sums).mean() - np.log(row_sums).mean())))
    return Factors(_normalised(row_sums**-0.25), col_factors, 0.5, True, level)


def row_steps(factors: Factors, rms: Floats, typical_rms: float, first: int = 0) -> Floats:
    """Returns the relative steps of rows, before column factors.

    Args:
        factors: of the tensor.
        rms: float64 [n], root mean squares of the weights of rows [first, first + n).
        typical_rms: of the whole tensor, > 0.
        first: number of the first row.
    """
    bounded_rms = np.maximum(rms, _MIN_RMS * typical_rms)
    scale = 1.0
    if factors.absolute:
        # Without a share of the weights' size a tensor would get few bits only because all its
        # gradients are small, which some models bear badly.
        weights_share = 1 - LEVEL_POWER - factors.power
        scale = factors.level**LEVEL_POWER * typical_rms**weights_share
    result: Floats = scale * factors.rows[first : first + len(rms)] * bounded_rms**factors.power
    return result


def _usable(values: NDArray[np.floating], size: int) -> bool:
    return (
        values.shape == (size,)
        and bool(np.isfinite(values).all())
        and bool((values >= 0).all())
        and bool(values.any())
    )


def _damped(values: NDArray[np.floating], share: float) -> Floats:
    floats: Floats = np.asarray(values, np.float64)
    result: Floats = floats + share * floats.mean()
    return result


def _normalised(values: Floats) -> Floats:
    """Returns the values with geometric mean 1."""
    result: Floats = values / np.exp(np.log(values).mean())
    return result
