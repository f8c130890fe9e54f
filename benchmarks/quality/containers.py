"""Our containers of one model at many rates: calibrated once, and one that is there stays."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from codecllm.calibrator import calibrate
from codecllm.converter import ConvertOptions, ParamsChoice, Rate, convert_model
from codecllm.converter.rate.search import fit
from codecllm.converter.source.source import SourceModel
from codecllm.quality import DEFAULT_CALIBRATION, quantized_tensors

LAYERS_ONLY = {
    "include": ("*.layers.*_proj.weight",),
    "exclude": ("*embed_tokens*", "lm_head*"),
}
"""The same matrices are quantized as by other tools."""


def convert_at(
    base: Path,
    out: Path,
    title: str,
    rates: Sequence[float],
    *,
    kind: str = DEFAULT_CALIBRATION,
    refine: bool = False,
    **options: Any,
) -> Iterator[Path]:
    """Converts a model at each rate, as `codecllm convert --bits RATE` does.

    Args:
        base: folder of the source.
        out: folder of the containers, `TITLE-RATE`.
        title: first part of their names.
        rates: bits per weight.
        kind: calibration, as for `codecllm.calibrator.calibrate`.
        refine: whether codes are chosen with feedback.
        options: further arguments of `ConvertOptions`: `device`, `codec`.

    Yields:
        Those that are there, then each as it is made.
    """
    missing = []
    for bits in rates:
        folder = out / f"{title}-{bits:g}"
        if (folder / "codecllm.json").exists():
            yield folder
        else:
            missing.append((bits, folder))
    if not missing:
        return
    options = {**LAYERS_ONLY, "force": True, **options}
    with SourceModel(base) as source:
        refined = quantized_tensors(source, ConvertOptions(**options)) if refine else ()
        device = options.get("device", "cpu")
        calibration = calibrate(source, kind, refined=refined, device=device)
        feedback = calibration.feedback()
        for bits, folder in missing:
            began = time.monotonic()
            rate = Rate(bits=bits, calibrate=calibration.record.kind, refine=refine)
            rate_options = ConvertOptions(rate=rate, **options)
            fitted_steps = fit(source, rate_options, calibration.statistics, feedback)
            choice = ParamsChoice(fitted_steps, rate, calibration.record)
            convert_model(source, folder, rate_options, choice=choice)
            seconds = time.monotonic() - began
            print(f"{folder.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
            yield folder
