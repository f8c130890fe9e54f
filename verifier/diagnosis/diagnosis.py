"""`diagnose`: runs the stages in order and ends with a conclusion: fault, place and advice."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from codecllm.converter.source.source import SourceModel
from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    ModelMismatchError,
    UsageError,
    foreign_errors_as,
)
from codecllm.formats.machine import available_memory, threads_of
from codecllm.formats.manifest.manifest import CODE
from codecllm.hub import resolve
from codecllm.verifier.baseline.baseline import MEMORY_FACTOR
from codecllm.verifier.checks.integrity import Progress, check_checksums, check_structure
from codecllm.verifier.diagnosis.causes import Cause, conclude
from codecllm.verifier.diagnosis.examination import Examination
from codecllm.verifier.diagnosis.options import DiagnoseOptions
from codecllm.verifier.report import Report, Stage, Verdict

MODELS_IN_MEMORY = 2


def diagnose(
    name_or_path: str | Path,
    source: str | Path | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Says why a container's output is wrong, or that nothing is.

    Stages: `structure`, `checksums`, `round trip`, `quantized`, `loaded`, `layers`, `text`,
    `baseline`. The paragraph at the end explains the first that fails; later ones still give their
    figures where the container can be loaded. Nothing is written. Stages 1 and 2 hold a few tiles
    per thread, the others two models.

    Args:
        name_or_path: container folder or Hub id.
        source: the model it was made from, a folder or Hub id; None takes the one that the manifest
            names.
        progress: called with a name, bytes done and bytes in all.
        options: fields of `DiagnoseOptions`.

    Returns:
        The report, with its conclusion. Faults are in the report, never raised.

    Raises:
        UsageError: there is no source, or an option makes no sense.
        HubError: a repository cannot be reached, found or read.
        SourceError: `source` is not a model.
    """
    settings = DiagnoseOptions(**options)
    check_arguments(source=source, progress=progress)  # before the container is read
    files = resolve(name_or_path, revision=settings.revision)
    report = Report(str(name_or_path), "diagnosis")
    expected_sha256 = settings.expected_manifest_sha256
    with (
        _stage(report, "structure") as stage,
        Container(files.folder, expected_manifest_sha256=expected_sha256) as container,
    ):
        report.manifest_sha256 = container.manifest_sha256
        pinned = expected_sha256 is not None
        check_structure(container, stage, report.warnings, pinned=pinned)
    # The second opening pins the manifest: no other container can slip in between.
    if report.manifest_sha256 is not None:
        with Container(files.folder, expected_manifest_sha256=report.manifest_sha256) as container:
            model_files = _source_files(source, container)
            scheme = container.manifest.options.scheme
            with_code = CODE in container.manifest.required_features
            with SourceModel(model_files.folder, view=scheme, with_code=with_code) as model:
                _Diagnosis(report, container, model, model_files.commit, settings, progress).run()
    report.conclusion = conclude(report)
    return report


def _source_files(source: str | Path | None, container: Container) -> Any:
    if source is not None:
        return resolve(source, kind="source")
    origin = container.manifest.source
    if origin.repo is None:
        raise UsageError(
            "a diagnosis needs the source: give --source "
            "(this container was made from a local folder)"
        )
    return resolve(origin.repo, revision=origin.commit, kind="source")


class _Diagnosis:
    """One diagnosis in progress."""

    def __init__(
        self,
        report: Report,
        container: Container,
        source: SourceModel,
        commit: str | None,
        options: DiagnoseOptions,
        progress: Progress | None,
    ) -> None:
        self._report = report
        self._container = container
        self._source = source
        self._commit = commit
        self._options = options
        self._progress = progress
        self._threads = threads_of(options.workers)
        self._examined: dict[str, Examination] = {}

    def run(self) -> None:
        """Runs every stage that makes sense."""
        with _stage(self._report, "checksums") as stage:
            check_checksums(self._container, stage, self._threads, self._progress)
        self._examine()
        obstacle = self._obstacle()
        if obstacle is not None:
            # Named all the same: a reader of the report must see that they did not run.
            for name in ("loaded", "layers", "text", "baseline"):
                with _stage(self._report, name) as stage:
                    _skip(stage, obstacle)
            return
        # transformers is imported only where a model will run.
        from codecllm.verifier.diagnosis.model.stages import ModelStages

        stages = ModelStages(self._container, self._source, self._examined, self._options)
        with _stage(self._report, "loaded") as stage, _model_errors():
            stages.check_loaded(stage)
        with _stage(self._report, "layers") as stage, _model_errors():
            stages.check_layers(stage, explained=not self._report.ok)
        with _stage(self._report, "text") as stage, _model_errors():
            stages.check_text(stage)
        with _stage(self._report, "baseline") as stage, _model_errors():
            stages.check_baseline(stage)
        stages.close()
        # Models hold reference cycles: without this the memory comes back much later.
        gc.collect()

    def _examine(self) -> None:
        from codecllm.verifier.diagnosis.codes.back_ends import present_back_ends
        from codecllm.verifier.diagnosis.codes.quantization import check_quantization
        from codecllm.verifier.diagnosis.codes.round_trip import check_round_trip, examine_all

        back_ends = (
            present_back_ends() if self._options.back_ends is None else self._options.back_ends
        )
        with _stage(self._report, "round trip") as stage:
            self._examined = examine_all(
                self._container, self._source, self._threads, self._progress
            )
            check_round_trip(
                self._container,
                self._source,
                self._commit,
                self._examined,
                back_ends,
                stage,
                self._threads,
            )
        with _stage(self._report, "quantized") as stage:
            check_quantization(self._container, self._examined, stage)

    def _obstacle(self) -> str | None:
        """Returns why no model is loaded, or None."""
        if any(one.faults for one in self._examined.values()):
            return "a damaged container is not loaded"
        if self._source.tensors.keys() != self._container.records.keys():
            return "source and container are different models"
        if self._container.manifest.file("config.json") is None:
            return "the container has no config.json: no model can be built"
        size = int(MODELS_IN_MEMORY * MEMORY_FACTOR * self._source.tensor_bytes)
        available = available_memory()
        # Models that do not fit would be swapped to the disk, layer after layer.
        if size > available:
            sizes = f"{size / 2**30:.1f} GiB and {available / 2**30:.1f} GiB of memory are free"
            return f"two models need {sizes}"
        return None


@contextmanager
def _stage(report: Report, name: str) -> Iterator[Stage]:
    """Adds a stage.

    An error that ends it becomes its last finding; its figures stay in its line when it fails.
    """
    stage = Stage(name)
    report.stages.append(stage)
    try:
        yield stage
    except CodecLLMError as exc:
        stage.fail(exc, cause=_cause_of(exc))
    if stage.verdict is Verdict.FAILED:
        count = len(stage.findings)
        stage.summary = f"{count} finding{'s' * (count != 1)}" + (
            f"; {stage.summary}" if stage.summary else ""
        )


def _model_errors() -> AbstractContextManager[None]:
    """Raises ModelMismatchError for what a model raises while it runs: it may be anything."""
    return foreign_errors_as(
        ModelMismatchError, "the model of this config does not run", file="config.json"
    )


def _cause_of(error: CodecLLMError) -> Cause:
    return Cause.LOAD_FAILED if isinstance(error, ModelMismatchError) else Cause.DAMAGED


def _skip(stage: Stage, reason: str) -> None:
    stage.skipped = True
    stage.summary = reason
