"""Samples of tensors for the search for a rate: relative steps of all rows, a few blocks to try."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.encode.blocks import blocks_of
from codecllm.converter.encode.quantize import as_float32
from codecllm.converter.plan.params import (
    WIDE_CODES,
    QuantParams,
    column_tiles,
    like_columns,
    nearest_bf16,
    next_bf16,
)
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.rate.allocation import Factors, Floats, Sensitivity, factors_of, row_steps
from codecllm.formats.schemes.int8 import MAX_WIDE_CODE, MIN_SCALE

_SAMPLED_BLOCKS = 2
_READ_ELEMENTS = 1 << 18
_LARGEST_CODE = MAX_WIDE_CODE - 8  # room for the rounding of steps to float32
_LARGEST_STEP = 2.0**121  # the largest power of two that a scale may be


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Facts of a tensor that do not depend on the rate.

    Attributes:
        plan: the tensor's.
        factors: relative steps but for the weights; of a plan of kind `column`, `factors.rows` are
            those of its columns.
        groups: uint8 [cols]: groups of like columns, from the narrowest codes to the widest; None
            where they are not worth their bits.
        blocks: numbers of the sampled blocks.
        within: bool [channels]: those that sampled blocks have.
        rms: float64 [channels]: root mean squares of the weights.
        relative: float64 [channels], steps at k = 1.
        largest: float64 [channels]: largest |weight / column factor|.
        limits: the smallest and the largest code that there may be.
    """

    plan: TensorPlan
    factors: Factors
    groups: NDArray[np.uint8] | None
    blocks: tuple[int, ...]
    within: NDArray[np.bool_]
    rms: Floats
    relative: Floats
    largest: Floats
    limits: tuple[int, int] = WIDE_CODES

    @property
    def spread(self) -> float:
        """Mean of log2(rms of a channel / its relative step)."""
        positive = self.rms > 0
        return (
            float(np.log2(self.rms[positive] / self.relative[positive]).mean())
            if positive.any()
            else 0.0
        )

    def params(self, scale: float, deadzone: float = 0.0) -> QuantParams:
        """Returns the steps of the tensor at k = `scale`, with a deadzone.

        A channel's step is made larger where a weight would otherwise lie too many steps from zero
        for the limits. At k = 0 steps are as fine as these allow.
        """
        largest_code = min(self.limits[1], _LARGEST_CODE)
        params = self._params(scale * self.relative, self.largest / largest_code)
        return replace(
            params,
            wide=bool((self.largest > 128.0 * params.row_scale.astype(np.float64)).any()),
            deadzone=deadzone,
            limits=self.limits,
        )

    def beyond_sample(self, params: QuantParams) -> float:
        """Returns the extra bits of the average weight over a sampled one, if both are Gaussian."""
        bits = 0.5 * np.log2(1 + 2 * np.pi * np.e * (self.rms / params.row_scale) ** 2)
        return float(bits.mean() - bits[self.within].mean())

    def _params(self, channels: Floats, lowest: Floats) -> QuantParams:
        """Rounds steps of channels, float64, to values of BF16, which take half the room.

        None below `lowest`, float64.
        """
        cols = (
            self.factors.cols.astype(np.float32)
            if self.plan.kind == "row" and self.factors.by_column
            else None
        )
        # The product of both scales must not fall below the smallest step; 2 covers its rounding.
        least = MIN_SCALE if cols is None else 2 * MIN_SCALE / min(1.0, float(cols.min()))
        bound = next_bf16(np.maximum(lowest, least).astype(np.float32))
        steps = np.minimum(channels, _LARGEST_STEP).astype(np.float32)
        rows = np.maximum(nearest_bf16(steps), bound)
        return QuantParams(rows, cols, None if cols is None else self.groups)


def sample(
    plan: TensorPlan,
    sensitivity: Sensitivity | None,
    *,
    column_scales: bool = True,
    limits: tuple[int, int] = WIDE_CODES,
) -> Sampled | None:
    """Reads a tensor once, finds its relative steps and picks blocks of it.

    None where a weight is not finite.

    Args:
        plan: of scheme `int8`.
        sensitivity: from a calibration, or None.
        column_scales: whether columns may have factors.
        limits: the smallest and the largest code that there may be.
    """
    if plan.kind == "column":
        sampled = _sample_columns(plan, sensitivity)
    else:
        factors = factors_of(sensitivity, *plan.matrix, column_scales=column_scales)
        sampled = _sample_rows(plan, factors)
    return None if sampled is None else replace(sampled, limits=limits)


def _sample_rows(plan: TensorPlan, factors: Factors) -> Sampled | None:
    rows, cols = plan.matrix
    # Column factors are stored as BF16, and the samples have to see the stored values.
    factors = replace(
        factors, cols=nearest_bf16(factors.cols.astype(np.float32)).astype(np.float64)
    )
    inverse_factors = np.float32(1.0) / factors.cols.astype(np.float32)
    rms, largest, squares = np.zeros(rows), np.zeros(rows), np.zeros(cols)
    for first, weights in read_rows(plan):
        row_range = slice(first, first + len(weights))
        part = rms[row_range] = row_rms(weights)
        if not np.isfinite(part).all():
            return None
        np.multiply(weights, inverse_factors, out=weights)
        np.abs(weights, out=weights)
        largest[row_range] = weights.max(axis=1)
        with np.errstate(divide="ignore"):
            squares += np.einsum(
                "rc,rc,r->c", weights, weights, np.where(part > 0, 1 / part, 0), dtype=np.float64
            )
    probe = QuantParams(
        np.ones(rows, np.float32), np.ones(cols, np.float32) if factors.by_column else None
    )
    # The blocks depend only on whether columns have factors, so ones will do.
    blocks = list(blocks_of(replace(plan, params=probe)))
    block_numbers = _chosen(len(blocks))
    within = np.zeros(rows, np.bool_)
    for number in block_numbers:
        within[blocks[number].row : blocks[number].row + blocks[number].rows] = True
    groups = _groups(squares, rows) if factors.by_column else None
    relative = row_steps(factors, rms, _geometric_mean(rms))
    return Sampled(plan, factors, groups, block_numbers, within, rms, relative, largest)


def _sample_columns(plan: TensorPlan, sensitivity: Sensitivity | None) -> Sampled | None:
    """As `_sample_rows` of the transposed tensor, whose columns have no factors.

    Every block has all channels.
    """
    rows, cols = plan.matrix
    squares, largest = np.zeros(cols), np.zeros(cols)
    for _, weights in read_rows(plan):
        squares += np.einsum("rc,rc->c", weights, weights, dtype=np.float64)
        np.maximum(largest, np.abs(weights).max(axis=0), out=largest)
    rms = np.sqrt(squares / rows)
    if not np.isfinite(rms).all():
        return None
    channel_sensitivity = None
    if sensitivity is not None and sensitivity.rows is not None:
        channel_sensitivity = Sensitivity(
            np.full(rows, np.asarray(sensitivity.rows, np.float64).mean()), sensitivity.cols
        )
    factors = factors_of(channel_sensitivity, cols, rows)
    relative = row_steps(factors, rms, _geometric_mean(rms))
    count = len(list(blocks_of(replace(plan, params=QuantParams(np.ones(cols, np.float32))))))
    return Sampled(
        plan, factors, None, _chosen(count), np.ones(cols, np.bool_), rms, relative, largest
    )


def _chosen(blocks: int) -> tuple[int, ...]:
    """Returns the numbers of the blocks to sample."""
    return tuple(range(blocks)) if blocks <= _SAMPLED_BLOCKS else (blocks // 3, 2 * blocks // 3)


def _groups(squares: Floats, rows: int) -> NDArray[np.uint8] | None:
    """Returns groups of columns with like squared codes, float64 [cols], one a tile.

    None where they save less than they take.

    A table for Gaussian columns of unlike variances costs half the log of the arithmetic over the
    geometric mean of these.
    """
    positive = squares[squares > 0]
    saved_bits = (
        0.5 * float(np.log2(positive.mean()) - np.log2(positive).mean()) if positive.size else 0.0
    )
    _, width = column_tiles(rows, squares.size)
    # The number of a group takes 8 bits a column.
    if saved_bits * rows < 8 or width == squares.size:
        return None
    return like_columns(squares, width)


def read_rows(plan: TensorPlan) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yields all rows, some at a time.

    Number of the first one, float32 weights [n, cols] that may be overwritten.
    """
    rows, cols = plan.matrix
    step = max(1, _READ_ELEMENTS // cols)
    for row in range(0, rows, step):
        stop = min(row + step, rows)
        words = plan.source.read_elements(row * cols, stop * cols).reshape(stop - row, cols)
        yield row, as_float32(words, plan.source.dtype.name, np.empty(words.shape, np.float32))


def row_rms(weights: NDArray[np.float32]) -> Floats:
    """Returns float64 [rows]: root mean squares of the rows of float32 [rows, cols] weights.

    Not finite where one is not.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        result: Floats = np.sqrt(
            np.einsum("rc,rc->r", weights, weights, dtype=np.float64) / weights.shape[1]
        )
    return result


def _geometric_mean(values: Floats) -> float:
    positive = values[values > 0]
    return float(np.exp(np.log(positive).mean())) if positive.size else 1.0
