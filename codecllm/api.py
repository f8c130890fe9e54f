"""What the command line does, as functions: a name or a folder in, a finished container (or plain model) out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from codecllm.converter import ConversionReport
from codecllm.converter import convert as convert_folder
from codecllm.converter.conversion import Progress
from codecllm.converter.exports import gguf
from codecllm.converter.exports.compressed_tensors import PackedLayout, plan_layout
from codecllm.converter.exports.export import ExportReport
from codecllm.converter.exports.export import export as export_folder
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.hub import resolve
from codecllm.quality import chosen_steps

ExportFormat = Literal["safetensors", "compressed-tensors", "gguf"]


@dataclass(frozen=True, slots=True)
class Converted:
    """A finished conversion.

    Attributes:
        report: what the conversion did, as it was before the baseline.
        manifest_sha256: sha256 of the manifest as it is now: the value to pin.
        baseline: what was recorded, as a verifier's `BaselineOutcome`, or None where none was asked for.
    """

    report: ConversionReport
    manifest_sha256: str
    baseline: Any


def convert(
    model: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    bits: float | None = None,
    ratio: float | None = None,
    quality: str | None = None,
    calibrate: str | Path | None = None,
    refine: bool = False,
    baseline: bool | None = None,
    progress: Progress | None = None,
    on_stage: Callable[[str], None] | None = None,
    **options: Any,
) -> Converted:
    """Converts a model into a container and records its baseline output.

    Without `bits`, `ratio` or `quality` the steps of int8 tensors follow from the largest weight of each channel. With one of
    them they are chosen such that the container has that rate, and such that bits go where the model is sensitive.

    Args:
        model: a Hub id or a local folder with safetensors weights.
        out: folder to make.
        revision: branch, tag or commit of a Hub id; the commit it leads to is recorded.
        token: Hub token.
        cache_dir: Hub cache.
        bits: bits per quantized weight, everything counted, 2 to 8.
        ratio: source bytes / stored bytes.
        quality: `high`, `balanced` or `small`: names for bits, see `codecllm.quality.QUALITIES`.
        calibrate: text from which the sensitivities come, where a rate is asked for: `self` (the model writes it), `random`
            (random tokens), `none`, or a text file. None is `self`, or `none` where the model cannot run here.
        refine: choose codes of linear layers with error feedback: fewer bits at equal quality, and a conversion that takes
            longer. Needs a rate and a calibration.
        baseline: True records in any case, False never, None where the source fits in memory and it takes under 10 minutes.
        progress: called with a tensor's name, bytes done and bytes in all.
        on_stage: called with a sentence when a stage begins.
        options: fields of `codecllm.converter.ConvertOptions` (scheme, include, exclude, workers, force, ...).

    Raises:
        CodecLLMError: see `codecllm.converter.convert` and `codecllm.hub.resolve`.
    """
    files = resolve(model, revision=revision, token=token, cache_dir=cache_dir, kind="source")
    rate: dict[str, Any] = {
        "bits": bits,
        "ratio": ratio,
        "quality": quality,
        "calibrate": calibrate,
        "refine": refine,
    }
    steps, notes = chosen_steps(files.folder, options, on_stage=on_stage, **rate)
    whence = {"repo": files.repo, "commit": files.commit}
    report = convert_folder(files.folder, out, progress=progress, **whence, **options, **steps)
    report.warnings.extend(notes)
    steps.clear()  # with it the temporary file of a refinement
    outcome, pinned = None, report.manifest_sha256
    if baseline is not False:
        from codecllm.verifier import record_baseline

        outcome = record_baseline(
            report.out, files.folder, required=baseline is True, on_stage=on_stage
        )
        with Container(report.out) as container:
            pinned = container.manifest_sha256
    return Converted(report, pinned, outcome)


def export(
    container: str | Path,
    out: str | Path,
    *,
    format: ExportFormat = "safetensors",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> ExportReport:
    """Writes a container's model (a folder or Hub id) for others to read; see `codecllm.converter.exports.export`.

    Args:
        container: folder or Hub id.
        out: folder to make.
        format: `safetensors`: a plain model in the source's dtypes. `compressed-tensors`: int8 weights of linear modules stay
            int8, in that library's `pack-quantized` layout; everything else is plain. `gguf`: refused, with the reason.
        revision: branch, tag or commit of a Hub id.
        token: Hub token.
        cache_dir: Hub cache.
        options: see `codecllm.converter.exports.export`.

    Raises:
        UsageError: the format cannot hold what the container holds.
        CodecLLMError: see `codecllm.converter.exports.export` and `codecllm.hub.resolve`.
    """
    if format not in get_args(ExportFormat):
        raise UsageError(
            "no such format", got=repr(format), expected=", ".join(get_args(ExportFormat))
        )
    folder = resolve(container, revision=revision, token=token, cache_dir=cache_dir).folder
    layout = None
    with Container(folder) as opened:
        if format == "gguf":
            gguf.refuse(opened)
        if format == "compressed-tensors":
            layout = _compressed_tensors_layout(opened)
    return export_folder(folder, out, layout=layout, **options)


def _compressed_tensors_layout(container: Container) -> PackedLayout:
    """Asks the model class which of its modules are linear, once it is clear that there is something to pack."""
    manifest = container.manifest
    config = manifest.file("config.json")
    if config is None or manifest.options.scheme != "int8":
        return plan_layout(manifest, ())
    from codecllm.loader.hf.adapter import linear_modules

    container.read_side_file(config)
    return plan_layout(manifest, linear_modules(container.folder))
