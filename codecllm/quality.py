"""From a requested rate to the quantization parameters of a conversion: calibrate, then search."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from codecllm.converter.options import ConvertOptions, Rate
from codecllm.converter.plan.choice import NO_CHOICE, ParamsChoice
from codecllm.converter.plan.conversion_plan import plan_conversion
from codecllm.converter.rate.search import fit
from codecllm.converter.source.source import SourceModel
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError

if TYPE_CHECKING:
    from codecllm.calibrator import Calibrated

OnStage = Callable[[str], None]

DEFAULT_CALIBRATION = "text"
_TEXTS = ("text", "self", "random")


def choose_params(
    model: SourceModel, options: ConvertOptions, on_stage: OnStage | None = None
) -> ParamsChoice:
    """Chooses the quantization parameters of all tensors, if the options ask for a rate.

    Args:
        model: the opened source.
        options: of the conversion.
        on_stage: called with a sentence when a stage begins, and now and then.

    Returns:
        The parameters and how they were chosen; `NO_CHOICE` where no rate is asked for.

    Raises:
        UsageError: the rate cannot be reached, or the calibration text cannot be used.
        UnsupportedEnvironmentError: a calibration was asked for and the model cannot run here.
        SourceError, FormatError: the source cannot be read.
    """
    rate = options.rate
    if rate is None:
        return NO_CHOICE
    refined_names = quantized_tensors(model, options) if rate.refine else frozenset()
    calibration, notes = _calibrate(model, rate, refined_names, options.device, on_stage)
    if on_stage is not None:
        on_stage("choosing steps: a sample of every tensor is quantized and packed")
    if calibration is None:
        fitted_params = fit(model, options, {})
        recorded_rate = replace(rate, calibrate="none")
        return ParamsChoice(fitted_params, recorded_rate, None, [*notes, *fitted_params.notes])
    fitted_params = fit(model, options, calibration.statistics, calibration.feedback(), on_stage)
    recorded_rate = replace(rate, calibrate=_recorded_kind(rate))
    return ParamsChoice(
        fitted_params, recorded_rate, calibration.record, [*notes, *fitted_params.notes]
    )


def on_known_device(options: ConvertOptions) -> ConvertOptions:
    """Returns the options with the name of one device of this machine, in place of `auto`.

    Raises:
        UnsupportedEnvironmentError: there is no such device.
    """
    if options.device == "cpu":
        return options
    try:
        from codecllm.loader.places import device_of
    except ImportError as exc:
        raise UnsupportedEnvironmentError(f"another device than cpu needs torch ({exc})") from exc
    return replace(options, device=str(device_of(options.device)))


def quantized_tensors(model: SourceModel, options: ConvertOptions) -> frozenset[str]:
    """Returns the names of the tensors whose parameters are to be chosen."""
    plans = plan_conversion(model, options, accepts_params=True).tensors
    return frozenset(plan.source.name for plan in plans if plan.accepts_params)


def _recorded_kind(rate: Rate) -> str:
    """Returns the kind of calibration that the manifest names: one of `_TEXTS`, or `file`."""
    kind = _kind(rate)
    # No local path stands in a manifest (docs/decisions/reproducible-bytes.md).
    return kind if kind in _TEXTS else "file"


def _kind(rate: Rate) -> str:
    return DEFAULT_CALIBRATION if rate.calibrate is None else str(rate.calibrate)


def _calibrate(
    model: SourceModel,
    rate: Rate,
    refined: Collection[str],
    device: str,
    on_stage: OnStage | None,
) -> tuple[Calibrated | None, list[str]]:
    """Runs the calibration; returns its result or None, and sentences for the user."""
    if rate.calibrate == "none" or (rate.code_bits is not None and not rate.refine):
        return None, []
    kind = _kind(rate)
    if kind not in _TEXTS and not Path(kind).is_file():
        raise UsageError(
            "no such calibration", got=kind, expected=f"{', '.join(_TEXTS)}, none or a text file"
        )
    try:
        calibration = _run_calibration(model, kind, refined, device, on_stage)
    except UnsupportedEnvironmentError as exc:
        # A calibration that the user asked for must not be skipped silently.
        if rate.calibrate is not None or refined or device != "cpu":
            raise
        return None, [f"not calibrated, steps follow from the weights alone: {exc}"]
    return calibration, calibration.notes


def _run_calibration(
    model: SourceModel,
    kind: str,
    refined: Collection[str],
    device: str,
    on_stage: OnStage | None,
) -> Calibrated:
    try:
        # Imported late: it needs torch, and a conversion without a rate does not.
        from codecllm.calibrator import calibrate
    except ImportError as exc:
        raise UnsupportedEnvironmentError(
            f"calibration needs torch and transformers ({exc})"
        ) from exc
    return calibrate(model, kind, on_stage, refined=refined, device=device)
