"""From what a user asks for (bits, ratio or a named quality) to the steps of a conversion: calibrate, then search."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from codecllm.converter.conversion import ConvertOptions, plan_conversion
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.search import Target, fit
from codecllm.converter.source.source import SourceModel
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError

QUALITIES = {"high": 6.0, "balanced": 5.0, "small": 4.0}
"""Named settings, in bits per quantized weight; docs/bits.md has the figures behind them."""


def chosen_steps(
    folder: Path,
    options: dict[str, Any],
    *,
    bits: float | None,
    ratio: float | None,
    quality: str | None,
    calibrate: str | Path | None,
    refine: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Chooses the steps of all tensors, if a rate is asked for.

    Args:
        folder: the source.
        options: fields of `ConvertOptions` that the user chose.
        bits: bits per quantized weight, everything counted.
        ratio: source bytes / stored bytes.
        quality: a key of `QUALITIES`.
        calibrate: `self`, `random`, `none` or a text file; None is `self`, or `none` where the model cannot run here.
        refine: whether codes are chosen with error feedback; needs a calibration.
        on_stage: called with a sentence when a stage begins, and now and then.

    Returns:
        Further fields of `ConvertOptions`, and sentences for the user; nothing where no rate is asked for.

    Raises:
        UsageError: the request cannot be meant or reached.
        UnsupportedEnvironmentError: a calibration was asked for and the model cannot run here.
        SourceError, FormatError: the source cannot be read.
    """
    if sum(value is not None for value in (bits, ratio, quality)) > 1:
        raise UsageError("bits, ratio and quality exclude one another")
    if bits is None and ratio is None and quality is None:
        if calibrate is not None:
            raise UsageError(
                "calibrate needs bits, ratio or quality: plain int8 takes its steps from the largest weights"
            )
        if refine:
            raise UsageError("refine needs bits, ratio or quality: plain int8 rounds to nearest")
        return {}, []
    if quality is not None and quality not in QUALITIES:
        raise UsageError("no such quality", got=repr(quality), expected=", ".join(QUALITIES))
    chosen = ConvertOptions(**options)
    target = Target(bits=QUALITIES[quality] if quality is not None else bits, ratio=ratio)
    target.check(chosen)
    if refine and calibrate == "none":
        raise UsageError(
            "refine needs a calibration: errors are fed back by what enters each layer",
            got="calibrate none",
        )
    refined = stepped_tensors(folder, chosen) if refine else frozenset()
    kind, found, notes = _calibrated(folder, calibrate, refined, on_stage)
    if on_stage is not None:
        on_stage("choosing steps: a sample of every tensor is quantized and packed")
    if found is None:
        fitted = fit(folder, chosen, target, {})
    else:
        feedback = None if found.products is None else Feedback(found.products)
        fitted = fit(folder, chosen, target, found.statistics, feedback, on_stage)
    asked = {
        "steps": fitted,
        "bits": target.bits,
        "ratio": ratio,
        "calibrate": kind,
        "refine": True if refine else None,
    }
    return {**asked, "calibration": None if found is None else found.record}, [
        *notes,
        *fitted.notes,
    ]


def stepped_tensors(folder: Path, options: ConvertOptions) -> frozenset[str]:
    """Returns the names of the tensors whose steps are to be chosen."""
    with SourceModel(folder, view="int8") as model:
        plans = plan_conversion(model, replace(options, steps=lambda plan: None)).tensors
    return frozenset(plan.source.name for plan in plans if plan.accepts_params)


def _calibrated(
    folder: Path,
    calibrate: str | Path | None,
    refined: Collection[str],
    on_stage: Callable[[str], None] | None,
) -> tuple[str, Any, list[str]]:
    """Returns the kind of calibration, what came of it or None, and notes."""
    if calibrate == "none":
        return "none", None, []
    kind = "self" if calibrate is None else str(calibrate)
    if kind not in ("self", "random") and not Path(kind).is_file():
        raise UsageError(
            "no such calibration", got=kind, expected="self, random, none or a text file"
        )
    try:
        try:
            from codecllm.calibrator import calibrate as run
        except ImportError as exc:
            raise UnsupportedEnvironmentError(
                f"calibration needs torch and transformers ({exc})"
            ) from exc
        found = run(folder, kind, on_stage, refined=refined)
    except UnsupportedEnvironmentError as exc:
        if calibrate is not None or refined:
            raise
        return "none", None, [f"not calibrated, steps follow from the weights alone: {exc}"]
    return kind if kind in ("self", "random") else "file", found, found.notes
