"""The outcome of a search for a rate: the provider of parameters, and its record."""

from __future__ import annotations

from dataclasses import dataclass, field

from codecllm.converter.options import Rate
from codecllm.converter.plan.tensor_plan import ParamsProvider
from codecllm.formats.manifest.records import Calibration


@dataclass(frozen=True, slots=True)
class ParamsChoice:
    """Chosen quantization parameters for one conversion.

    Attributes:
        provider: chooses the parameters of each int8 tensor; None takes all scales from the largest
            weights.
        rate: the rate for which they were chosen, with the kind of calibration that was run;
            recorded in the manifest.
        calibration: the text from which sensitivities were learned; recorded in the manifest.
        notes: sentences for the user.
    """

    provider: ParamsProvider | None = None
    rate: Rate | None = None
    calibration: Calibration | None = None
    notes: list[str] = field(default_factory=list)


NO_CHOICE = ParamsChoice()
"""Plain int8 or lossless: nothing is chosen."""
