"""Seeded steps for tests: scales of rows (from their RMS) and columns, groups of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from codecllm.converter import ConvertOptions, Rate
from codecllm.converter.plan.params import QuantParams, nearest_bf16
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.rate.allocation import Statistics
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.fitted import FittedParams
from codecllm.converter.rate.search import fit
from codecllm.converter.source.source import SourceModel
from codecllm.formats.schemes.float_bits import float32_from_bits
from codecllm.formats.schemes.int8 import quantize, step_sizes

WIDE = "model.layers.1.mlp.up_proj.weight"
"""The tensor that `mixed` makes wide."""


def weights_of(plan: TensorPlan) -> np.ndarray:
    """Returns the float32 weights of a tensor as the matrix that its plan sees."""
    words = plan.source.read_elements(0, plan.source.entry.elements)
    return float32_from_bits(words, plan.source.dtype.name).reshape(plan.matrix)


def make_steps(
    plan: TensorPlan,
    factor: float = 0.1,
    *,
    columns: bool = True,
    short: bool = False,
    **fields: object,
) -> QuantParams:
    """Returns steps of `factor` times the RMS of each channel; below 0.01 codes become wide.

    Args:
        plan: the tensor's.
        factor: step / root mean square.
        columns: whether columns get scales and groups (never where each column is a channel).
        short: whether scales are values of type BF16.
        fields: further fields of `QuantParams`.
    """
    weights = weights_of(plan)
    rng = np.random.default_rng(plan.source.entry.elements)
    kept = nearest_bf16 if short else np.copy
    if plan.kind == "column" or not columns:
        axis = 0 if plan.kind == "column" else 1
        return QuantParams(kept(_scales(weights, axis, factor)), **fields)  # type: ignore[arg-type]
    col_scale = kept(np.exp(rng.standard_normal(weights.shape[1]) * 0.5).astype(np.float32))
    scaled = (weights / col_scale).astype(np.float64)
    rank = np.argsort(np.argsort(np.square(scaled).mean(axis=0)))
    groups = (255 - rank * 6 // len(rank) * 51).astype(np.uint8)
    row_scale = kept(_scales(scaled, 1, factor))
    return QuantParams(row_scale, col_scale, groups, **fields)  # type: ignore[arg-type]


def provider(factor: float = 0.1, **fields: object) -> Callable[[TensorPlan], QuantParams]:
    """Returns a provider that gives every tensor the steps of `make_steps`."""
    return lambda plan: make_steps(plan, factor, **fields)  # type: ignore[arg-type]


def row_steps(
    largest: int, kept: Callable[[np.ndarray], np.ndarray] = np.copy
) -> Callable[[TensorPlan], QuantParams]:
    """Returns a provider of steps of rows alone, whose largest code is at most `largest`.

    Args:
        largest: the code.
        kept: rounds the steps, upwards.
    """

    def choose(plan: TensorPlan) -> QuantParams:
        farthest = np.abs(weights_of(plan)).max(axis=1)
        return QuantParams(kept((farthest / largest).astype(np.float32)))

    return choose


def fitted(
    folder: Path,
    bits: float,
    statistics: Statistics | None = None,
    feedback: Feedback | None = None,
    on_stage: Callable[[str], None] | None = None,
    column_scales: bool = True,
    **fields: object,
) -> FittedParams:
    """Returns parameters for a rate.

    Args:
        folder: the source.
        bits: per quantized weight.
        statistics: sensitivities by tensor name.
        feedback: refines codes, or None.
        on_stage: called with a sentence when a stage begins.
        column_scales: as in `Rate`.
        fields: further fields of `ConvertOptions`.
    """
    rate = Rate(bits=bits, column_scales=column_scales)
    options = ConvertOptions(rate=rate, **fields)  # type: ignore[arg-type]
    with SourceModel(folder) as model:
        return fit(model, options, statistics or {}, feedback, on_stage)


def mixed(plan: TensorPlan) -> QuantParams:
    """Returns steps for a tiny llama: a wide tensor, a refined one, one without columns, others."""
    name = plan.source.name
    if name == WIDE:
        return make_steps(plan, 0.012, short=True)
    if name == "model.layers.0.self_attn.q_proj.weight":
        return make_steps(plan, 0.1, columns=False)
    steps = make_steps(
        plan, 0.1, short="self_attn" not in name, tile=(24, 20) if "down" in name else None
    )
    if name == "model.layers.0.mlp.up_proj.weight":
        codes = quantize(weights_of(plan), step_sizes(steps.row_scale, steps.col_scale), wide=True)
        codes[::2, ::3] += 1
        return replace(steps, refined="feedback", codes=lambda first, last: codes[first:last])
    return steps


def _scales(weights: np.ndarray, axis: int, factor: float) -> np.ndarray:
    scales = factor * np.sqrt(np.square(weights.astype(np.float64)).mean(axis=axis))
    return np.where(scales > 0, scales, 1).astype(np.float32)
