"""What the command line does, as functions: a name or a folder in, a finished container (or plain model) out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codecllm.converter import ConversionReport
from codecllm.converter import convert as convert_folder
from codecllm.converter.conversion import Progress
from codecllm.converter.export import ExportReport
from codecllm.converter.export import export as export_folder
from codecllm.hub import resolve


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
    baseline: bool | None = None,
    progress: Progress | None = None,
    on_stage: Callable[[str], None] | None = None,
    **options: Any,
) -> Converted:
    """Converts a model into a container and records its baseline output.

    Args:
        model: a Hub id or a local folder with safetensors weights.
        out: folder to make.
        revision: branch, tag or commit of a Hub id; the commit it leads to is recorded.
        token: Hub token.
        cache_dir: Hub cache.
        baseline: True records in any case, False never, None where the source fits in memory and it takes under 10 minutes.
        progress: called with a tensor's name, bytes done and bytes in all.
        on_stage: called with a sentence when a stage begins.
        options: fields of `codecllm.converter.ConvertOptions` (scheme, include, exclude, workers, force, ...).

    Raises:
        CodecLLMError: see `codecllm.converter.convert` and `codecllm.hub.resolve`.
    """
    files = resolve(model, revision=revision, token=token, cache_dir=cache_dir, kind="source")
    report = convert_folder(files.folder, out, progress=progress, repo=files.repo, commit=files.commit, **options)
    outcome, pinned = None, report.manifest_sha256
    if baseline is not False:
        from codecllm.formats.container import Container
        from codecllm.verifier import record_baseline

        outcome = record_baseline(report.out, files.folder, required=baseline is True, on_stage=on_stage)
        with Container(report.out) as container:
            pinned = container.manifest_sha256
    return Converted(report, pinned, outcome)


def export(
    container: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> ExportReport:
    """Writes the plain safetensors model of a container (a folder or Hub id); see `codecllm.converter.export`."""
    files = resolve(container, revision=revision, token=token, cache_dir=cache_dir)
    return export_folder(files.folder, out, **options)
