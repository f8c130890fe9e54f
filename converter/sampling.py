"""A tensor as the search for a rate sees it: relative steps of all its columns and of the rows of a few blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.allocation import Factors, Floats, Sensitivity, factors_of, row_steps
from codecllm.converter.encode import blocks_of
from codecllm.converter.policy import TensorPlan
from codecllm.converter.quantize import as_float32
from codecllm.converter.steps import Steps, column_tiles, like_columns, nearest_bf16, next_bf16
from codecllm.formats.schemes.int8 import MAX_WIDE_CODE, MIN_SCALE

_SAMPLED_BLOCKS = 2
_READ_ELEMENTS = 1 << 18
_LARGEST_CODE = MAX_WIDE_CODE - 8  # room for the rounding of steps to float32


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What is known of a tensor before the rate is.

    Attributes:
        plan: the tensor's.
        factors: relative steps but for the weights; of a plan of kind `column`, `factors.rows` are those of its columns.
        typical_rms: geometric mean of the channels' root mean squares.
        groups: uint8 [cols]: groups of like columns, from the narrowest codes to the widest; None where they are not worth
            their bits.
        blocks: numbers of the sampled blocks.
        sampled: float64 [channels], relative steps; 1 for rows outside of the sample.
        largest: float64 [channels]: largest |weight / column factor|; 0 for rows outside of the sample.
        spread: mean over the sample of log2(rms of the channel / its relative step).
    """

    plan: TensorPlan
    factors: Factors
    typical_rms: float
    groups: NDArray[np.uint8] | None
    blocks: tuple[int, ...]
    sampled: Floats
    largest: Floats
    spread: float

    def sample_steps(self, scale: float) -> Steps:
        """Returns steps that hold for the sampled blocks, at k = `scale`."""
        return self._steps(scale * self.sampled, self.largest / _LARGEST_CODE, wide=False)

    def all_steps(self, plan: TensorPlan, scale: float, *, wide: bool) -> Steps | None:
        """Returns the steps of the whole tensor at k = `scale`, after one pass over it; None where a weight is not finite.

        `plan` is the tensor's in the source that is open now. A channel's step is made larger where a weight would otherwise
        lie too many steps from zero for the format.
        """
        if self.plan.kind == "column":
            return replace(self.sample_steps(scale), wide=wide)
        rows, lowest = np.empty(self.plan.matrix[0]), np.empty(self.plan.matrix[0])
        cols = np.float32(1.0) / self.factors.cols.astype(np.float32)
        for first, weights in read_rows(plan):
            last = first + len(weights)
            rms = row_rms(weights)
            if not np.isfinite(rms).all():
                return None
            rows[first:last] = scale * row_steps(self.factors, rms, self.typical_rms, first)
            np.abs(weights, out=weights)
            np.multiply(weights, cols, out=weights)
            lowest[first:last] = weights.max(axis=1) / _LARGEST_CODE
        return self._steps(rows, lowest, wide=wide)

    def _steps(self, channels: Floats, lowest: Floats, *, wide: bool) -> Steps:
        """Rounds steps of channels, float64, to values of BF16, which take half the room; none below `lowest`, float64."""
        cols = self.factors.cols.astype(np.float32) if self.plan.kind == "row" and self.factors.by_column else None
        least = MIN_SCALE if cols is None else 2 * MIN_SCALE / min(1.0, float(cols.min()))
        bound = next_bf16(np.maximum(lowest, least).astype(np.float32))
        rows = np.maximum(nearest_bf16(channels.astype(np.float32)), bound)
        return Steps(rows, cols, None if cols is None else self.groups, wide=wide)


def sample(plan: TensorPlan, sensitivity: Sensitivity | None) -> Sampled | None:
    """Reads some blocks of a tensor and finds its relative steps there; None where a weight of them is not finite.

    Args:
        plan: of scheme `int8`.
        sensitivity: what a calibration learned of it, or None.
    """
    return _sample_columns(plan, sensitivity) if plan.kind == "column" else _sample_rows(plan, sensitivity)


def _sample_rows(plan: TensorPlan, sensitivity: Sensitivity | None) -> Sampled | None:
    rows, cols = plan.matrix
    factors = factors_of(sensitivity, rows, cols)
    factors = replace(factors, cols=nearest_bf16(factors.cols.astype(np.float32)).astype(np.float64))
    probe = Steps(np.ones(rows, np.float32), np.ones(cols, np.float32) if factors.by_column else None)
    blocks = list(blocks_of(replace(plan, steps=probe)))
    chosen = range(len(blocks)) if len(blocks) <= _SAMPLED_BLOCKS else (len(blocks) // 3, 2 * len(blocks) // 3)
    runs = [(blocks[number].row, blocks[number].row + blocks[number].rows) for number in chosen]
    rms, largest, squares = np.zeros(rows), np.zeros(rows), np.zeros(cols)
    for run in runs:
        for first, weights in read_rows(plan, *run):
            here = slice(first, first + len(weights))
            part = rms[here] = row_rms(weights)
            if not np.isfinite(part).all():
                return None
            largest[here] = (np.abs(weights) / factors.cols).max(axis=1)
            with np.errstate(divide="ignore"):
                squares += np.einsum("rc,rc,r->c", weights, weights, np.where(part > 0, 1 / part, 0), dtype=np.float64)
    taken = np.concatenate([np.arange(*run) for run in runs])
    typical = _geometric_mean(rms[taken])
    steps = row_steps(factors, rms[taken], typical)
    sampled = np.ones(rows)
    sampled[taken] = steps
    groups = _groups(squares / factors.cols**2, rows) if factors.by_column else None
    spread = _spread(rms[taken], steps)
    return Sampled(plan, factors, typical, groups, tuple(chosen), sampled, largest, spread)


def _sample_columns(plan: TensorPlan, sensitivity: Sensitivity | None) -> Sampled | None:
    """As `_sample_rows` of the transposed tensor, whose columns have no factors, after a pass over all of it."""
    rows, cols = plan.matrix
    squares, largest = np.zeros(cols), np.zeros(cols)
    for _, weights in read_rows(plan):
        squares += np.einsum("rc,rc->c", weights, weights, dtype=np.float64)
        np.maximum(largest, np.abs(weights).max(axis=0), out=largest)
    rms = np.sqrt(squares / rows)
    if not np.isfinite(rms).all():
        return None
    turned = None
    if sensitivity is not None and sensitivity.rows is not None:
        turned = Sensitivity(np.full(rows, np.asarray(sensitivity.rows, np.float64).mean()), sensitivity.cols)
    factors = factors_of(turned, cols, rows)
    typical = _geometric_mean(rms)
    sampled = row_steps(factors, rms, typical)
    count = len(list(blocks_of(replace(plan, steps=Steps(np.ones(cols, np.float32))))))
    chosen = tuple(range(count)) if count <= _SAMPLED_BLOCKS else (count // 3, 2 * count // 3)
    return Sampled(plan, factors, typical, None, chosen, sampled, largest, _spread(rms, sampled))


def _groups(squares: Floats, rows: int) -> NDArray[np.uint8] | None:
    """Returns groups of columns with like squared codes, float64 [cols], one a tile; None where they save less than they take.

    A table for Gaussian columns of unlike variances costs half the log of the arithmetic over the geometric mean of these.
    """
    positive = squares[squares > 0]
    saved = 0.5 * float(np.log2(positive.mean()) - np.log2(positive).mean()) if positive.size else 0.0
    _, width = column_tiles(rows, squares.size)
    if saved * rows < 8 or width == squares.size:
        return None
    return like_columns(squares, width)


def read_rows(plan: TensorPlan, first: int = 0, last: int | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yields rows [first, last), some at a time: number of the first one, float32 weights [n, cols] that may be overwritten."""
    rows, cols = plan.matrix
    last = rows if last is None else last
    step = max(1, _READ_ELEMENTS // cols)
    for row in range(first, last, step):
        stop = min(row + step, last)
        words = plan.source.read_elements(row * cols, stop * cols).reshape(stop - row, cols)
        yield row, as_float32(words, plan.source.dtype.name, np.empty(words.shape, np.float32))


def row_rms(weights: NDArray[np.float32]) -> Floats:
    """Returns float64 [rows]: root mean squares of the rows of float32 [rows, cols] weights; not finite where one is not."""
    with np.errstate(invalid="ignore", over="ignore"):
        result: Floats = np.sqrt(np.einsum("rc,rc->r", weights, weights, dtype=np.float64) / weights.shape[1])
    return result


def _geometric_mean(values: Floats) -> float:
    positive = values[values > 0]
    return float(np.exp(np.log(positive).mean())) if positive.size else 1.0


def _spread(rms: Floats, steps: Floats) -> float:
    positive = rms > 0
    return float(np.log2(rms[positive] / steps[positive]).mean()) if positive.any() else 0.0
