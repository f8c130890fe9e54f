"""`python -m benchmarks.quality.trellis`: entropy-coded steps along a trellis, beside plain ones.

First on Gaussian numbers: bits above the rate-distortion bound at equal error. Then on a model:
codes of every linear layer by plain rounding and by the trellis, without or with feedback, both
with the steps that a conversion would take (half steps for the trellis); order-0 entropies of all
groups of columns, of both cosets apart for the trellis, and 12 bits for each entry of their tables.
Beside them the bits that `resident="packed"` takes for the codes: fixed ones, and 32 for each code
beyond them. No container is written. A C compiler must be there; `trellis.c` explains the trellis.
"""

from __future__ import annotations

import timeit
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.quality import models
from benchmarks.quality.ablation import calibrated
from benchmarks.quality.trellis_path import matrix_codes, path, price_of, with_last_bits
from benchmarks.quality.trials import Trials, steps_and_codes, weights_of
from codecllm.calibrator.text import REFINED_LENGTH
from codecllm.converter.plan.conversion_plan import plan_conversion
from codecllm.converter.rate.feedback import Feedback, refined_codes
from codecllm.converter.rate.fitted import FittedParams
from codecllm.converter.rate.search import deadzone_at, fit
from codecllm.converter.source.source import SourceModel
from codecllm.loader.packed.layout import best_int_bits
from codecllm.quality import DEFAULT_CALIBRATION

_SAMPLES, _GROUPS, _TABLE_ENTRY_BITS = 1 << 19, 8, 12
_GAUSSIAN_BITS = 2.05
_DECODED_COLS = 1024


def entropy_bits(
    codes: NDArray[np.integer], coset: NDArray[np.uint8] | None = None
) -> tuple[float, int]:
    """Returns the bits of codes at their order-0 entropy, and the number of table entries.

    With a coset each of its two values has a table of its own.
    """
    flat = codes.astype(np.int64).ravel() - int(codes.min())
    parts = [flat] if coset is None else [flat[coset.ravel() == value] for value in (0, 1)]
    bits, entries = 0.0, 0
    for part in parts:
        counts = np.bincount(part)
        counts = counts[counts > 0]
        bits -= float((counts * np.log2(counts / max(1, counts.sum()))).sum())
        entries += counts.size
    return bits, entries


def packed_bits(codes: NDArray[np.integer]) -> float:
    """Returns the bits of a code in the layout of `resident="packed"`."""
    bits = best_int_bits(codes.astype(np.int32))
    half = 1 << (bits - 1)
    return bits + 32 * float(((codes < -half) | (codes >= half)).mean())


def gaussian(rate: float) -> list[tuple[float, float]]:
    """Returns two figures of plain steps with the deadzone, and of the trellis.

    The bits above the bound, and those in memory.
    """
    values = np.random.default_rng(0).standard_normal(_SAMPLES).astype(np.float32)
    gaps = []
    for trellis in (False, True):
        step = 2.0 ** (_GAUSSIAN_BITS - rate) / (2 if trellis else 1)
        for _ in range(4):
            scaled = (values / np.float32(step)).astype(np.float32)
            if trellis:
                codes, coset, _ = path(scaled, float(price_of(float((scaled**2).mean()))))
            else:
                shrunk = np.maximum(np.abs(scaled) - np.float32(deadzone_at(rate)), 0)
                codes, coset = np.rint(np.copysign(shrunk, scaled)).astype(np.int32), None
            bits = entropy_bits(codes, coset)[0] / _SAMPLES
            error = float(((values - step * codes) ** 2).mean())
            step *= 2.0 ** (bits - rate)
        gaps.append((bits + 0.5 * float(np.log2(error)), packed_bits(codes)))
    return gaps


def decoding() -> float:
    """Returns the ns that the last bit of a symbol takes a decoder, and checks its codes."""
    values = np.random.default_rng(0).standard_normal(_SAMPLES).astype(np.float32) * 3
    codes = path(values, float(price_of(9.0)))[0].astype(np.int8)
    assert (with_last_bits((codes >> 1)[:, None])[:, 0] == codes).all()
    symbols = (codes >> 1).reshape(-1, _DECODED_COLS)
    seconds = min(timeit.repeat(lambda: with_last_bits(symbols), number=1, repeat=40))
    return 1e9 * seconds / symbols.size


def quantized(
    model: SourceModel, fitted_params: FittedParams, trials: Trials, feedback: Feedback | None
) -> Iterator[tuple[str, float, float]]:
    """Yields name, stored bits and packed ones of two ways, whose weights the twin holds meanwhile.

    `plain` and `trellis`; with feedback, if it is given.
    """
    options = trials.options(5)
    plans = plan_conversion(model, options, accepts_params=True).tensors
    for name in ("plain", "trellis"):
        bits = in_memory = weights_seen = 0.0
        for plan in plans:
            params = fitted_params(plan) if plan.accepts_params else None
            if params is None:
                continue
            weights = weights_of(plan)
            col_scale = params.col_scale
            cols = np.ones(weights.shape[1], np.float32) if col_scale is None else col_scale
            factor = None if feedback is None else feedback.factor(plan.source.name)
            coset = None
            step = params.row_scale[:, None] * cols
            if name == "trellis":
                half = params.row_scale * np.float32(0.5)
                codes, coset = matrix_codes(weights, (half, cols), factor)
                step = half[:, None] * cols
            elif factor is not None:
                scales = (params.row_scale, cols)
                codes = refined_codes(weights, scales, factor, params.deadzone)
            else:
                codes = steps_and_codes(plan, params)[1].astype(np.int32)
            for group in np.array_split(params_order(params.col_groups, weights.shape[1]), _GROUPS):
                part = None if coset is None else coset[:, group]
                group_bits, entries = entropy_bits(codes[:, group], part)
                bits += group_bits + _TABLE_ENTRY_BITS * entries
            in_memory += packed_bits(codes) * codes.size
            weights_seen += codes.size
            trials.put(plan.source.name, codes.astype(np.float32) * step)
        yield name, bits / weights_seen, in_memory / weights_seen


def params_order(groups: NDArray[np.uint8] | None, cols: int) -> NDArray[np.int64]:
    """Returns the columns, like ones together."""
    return np.arange(cols) if groups is None else np.argsort(groups, kind="stable")


def main(
    model: Annotated[str, typer.Argument(help="smollm2, qwen, a folder, or none.")] = "smollm2",
    rates: Annotated[
        list[float] | None, typer.Option("--bits", help="Bits per weight; may be repeated.")
    ] = None,
    refine: Annotated[bool, typer.Option(help="With feedback.")] = False,
    text: Annotated[str, typer.Option("--calibrate", help="As for the ablation.")] = (
        DEFAULT_CALIBRATION
    ),
    length: Annotated[
        int, typer.Option(help="Tokens of each of 64 sequences for feedback.")
    ] = REFINED_LENGTH,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 768,
) -> None:
    """Prints bits above the bound of Gaussian numbers, then bits and KL of a model."""
    console = Console(width=140)
    for rate in rates or [2.0, 2.5, 3.0, 4.0]:
        for name, (above, packed) in zip(("plain", "trellis"), gaussian(rate), strict=True):
            console.print(
                f"Gaussian, {rate:g} bits, {name}: {above:.3f} above the bound, packed {packed:.2f}"
            )
    console.print(f"last bits at decode: {decoding():.2f} ns a symbol")
    if model == "none":
        return
    torch.manual_seed(0)
    trials = Trials(models.folder_of(model), tokens)
    seen = calibrated(trials, text, refine=refine, refined_length=length)
    feedback = None if seen.products is None else Feedback(seen.products)
    for rate in rates or [2.0, 2.5, 3.0, 4.0]:
        with SourceModel(trials.source) as source:
            fitted_params = fit(source, trials.options(rate), seen.statistics)
            for name, bits, packed in quantized(source, fitted_params, trials, feedback):
                kl = " ".join(f"{score.mean_kl:.4f}" for score in trials.scores())
                refined = ", feedback" if feedback else ""
                sizes = f"{bits:.3f} bits, packed {packed:.2f}"
                console.print(f"{rate:g} asked, {name}{refined}: {sizes}, KL {kl}")


if __name__ == "__main__":
    typer.run(main)
