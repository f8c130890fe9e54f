"""`verify`: runs the stages in order and collects the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from codecllm.converter.source.source import SourceModel
from codecllm.formats.arguments.check import check_arguments, choice
from codecllm.formats.container import Container
from codecllm.formats.errors import CodecLLMError, UsageError
from codecllm.formats.machine import threads_of
from codecllm.formats.manifest.manifest import CODE
from codecllm.formats.shards.consistency import expansion_bound
from codecllm.hub import resolve
from codecllm.verifier.checks.integrity import Progress, check_checksums, check_structure
from codecllm.verifier.report import Report, Stage, Verdict
from codecllm.verifier.signature import Signer, check_signature

Level = Literal["structure", "checksums", "full"]
LEVELS: tuple[Level, ...] = ("structure", "checksums", "full")


def verify(
    name_or_path: str | Path,
    *,
    level: Level = "full",
    source: str | Path | None = None,
    require_baseline: bool = False,
    baseline: bool = True,
    workers: int | None = None,
    expected_manifest_sha256: str | None = None,
    signature: str | Path | None = None,
    public_key: str | Path | None = None,
    identity: str | None = None,
    issuer: str | None = None,
    trust_config: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Checks a container. Nothing is written and nothing is repaired.

    Stages: `signature` (where one is given), `structure` (files, sizes, headers, chunk tables),
    `checksums` (every byte of every listed file), and at level `full`: `decode` (every chunk, every
    tensor's digest), `ratio`, `source` and `model` (with `source`: each tensor, and the loaded
    container beside the source as transformers loads it), `baseline` (the recorded prompts). A
    stage whose result would mean nothing after an earlier failure is reported as skipped.

    Args:
        name_or_path: container folder or Hub id.
        level: how far to go.
        source: folder or Hub id of the source model; every decoded tensor is compared with it.
        require_baseline: fail where no baseline is recorded.
        baseline: False leaves the baseline out.
        workers: threads; None takes one per core.
        expected_manifest_sha256: fail for any other manifest, and for an unlisted file that a class
            of transformers might read.
        signature: file that `codecllm sign` wrote: every file must be as it was signed, and no
            other file be there but README.md and .gitattributes. Needs `public_key`, or `identity`
            and `issuer`; see `signature.Signer`.
        public_key: PEM file of the signer's public key.
        identity: of the signer, in a certificate of Sigstore.
        issuer: URL of the issuer that vouched for the identity.
        trust_config: file of Sigstore's trust configuration, so that no server is asked.
        revision: branch, tag or commit of a Hub id.
        token: Hub token.
        cache_dir: Hub cache.
        progress: called with a name, bytes done and bytes in all.

    Returns:
        The report. Damage is in the report, never raised.

    Raises:
        UsageError: the arguments contradict each other, or `CODECLLM_MAX_EXPANSION` is no number.
        HubError: a repository cannot be reached, found or read.
        SourceError: `source` is not a model.
        UnsupportedEnvironmentError: a signature is given, and `model-signing` is not installed.
        OSError: signature, key or trust configuration cannot be read.
    """
    # Before hours of work.
    check_arguments(
        source=source,
        require_baseline=require_baseline,
        baseline=baseline,
        workers=workers,
        expected_manifest_sha256=expected_manifest_sha256,
        signature=signature,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        progress=progress,
    )
    choice(LEVELS)(level, "level")
    signer = Signer(public_key, identity, issuer, trust_config)
    if (signature is not None) != signer.is_given:
        raise UsageError(
            "a signature is checked with a public key or an identity, and these with a signature"
        )
    # Before any download: a key that cannot be read is no finding about the container.
    verifier = signer.verifier() if signer.is_given else None
    expansion_bound()  # nor is a bound that is no number
    if level != "full" and (source is not None or require_baseline):
        raise UsageError(
            "comparing with the source or requiring a baseline needs level full", got=level
        )
    files = resolve(name_or_path, revision=revision, token=token, cache_dir=cache_dir)
    report = Report(str(name_or_path), level, commit=files.commit)
    threads = threads_of(workers)
    expected_digest = expected_manifest_sha256
    if signature is not None:
        from_hub = files.commit is not None
        with _stage(report, "signature") as stage:
            check_signature(files.folder, signature, signer, verifier, stage, from_hub=from_hub)
    with (
        _stage(report, "structure") as stage,
        Container(files.folder, expected_manifest_sha256=expected_digest) as container,
    ):
        report.manifest_sha256 = container.manifest_sha256
        pinned = expected_manifest_sha256 is not None
        check_structure(container, stage, report.warnings, pinned=pinned)
    if report.manifest_sha256 is None or level == "structure":
        return report
    # The files may change between the stages. The digest binds the second reading to the manifest
    # of the first one, so that all verdicts are about one container.
    with Container(files.folder, expected_manifest_sha256=report.manifest_sha256) as container:
        with _stage(report, "checksums") as stage:
            check_checksums(container, stage, threads, progress)
        if level == "full":
            _check_contents(
                container,
                report,
                source,
                baseline or require_baseline,
                require_baseline,
                threads,
                progress,
            )
    return report


def _check_contents(
    container: Container,
    report: Report,
    source: str | Path | None,
    baseline: bool,
    require_baseline: bool,
    threads: int,
    progress: Progress | None,
) -> None:
    """Runs the stages that need decoded tensors."""
    # These modules import torch or transformers, which the first two stages do without.
    from codecllm.verifier.baseline.baseline import check_baseline
    from codecllm.verifier.checks.comparison import check_source
    from codecllm.verifier.checks.decoding import check_decoding
    from codecllm.verifier.checks.ratio import report_ratio
    from codecllm.verifier.source_model import check_source_model

    scans = {}
    with _stage(report, "decode") as stage:
        scans = check_decoding(container, stage, threads, progress)
    with _stage(report, "ratio") as stage:
        if report.ok:
            report_ratio(container, stage, scans)
        else:
            # The ratio of a model that does not decode would be a claim without proof.
            _skip(stage, "not stated for a damaged container")
    if source is not None:
        folder, scheme = resolve(source, kind="source").folder, container.manifest.options.scheme
        with SourceModel(
            folder, view=scheme, with_code=CODE in container.manifest.required_features
        ) as model:
            with _stage(report, "source") as stage:
                check_source(container, model, stage, threads, progress)
            with _stage(report, "model") as stage:
                if report.ok:
                    check_source_model(container, model, stage, threads)
                else:
                    _skip(stage, "a container that is not the source is not run beside it")
    if not baseline:
        return
    with _stage(report, "baseline") as stage:
        if report.ok:
            check_baseline(container, stage, required=require_baseline, workers=threads)
        else:
            _skip(stage, "a damaged container is not run")


@contextmanager
def _stage(report: Report, name: str) -> Iterator[Stage]:
    """Adds a stage to the report; an error that ends it becomes its last finding."""
    stage = Stage(name)
    report.stages.append(stage)
    try:
        yield stage
    except CodecLLMError as exc:
        # A report lists every fault, so a stage that fails does not end the verification.
        stage.fail(exc)
    if stage.verdict is Verdict.FAILED:
        count = len(stage.findings)
        stage.summary = f"{count} fault{'s' * (count != 1)}"


def _skip(stage: Stage, reason: str) -> None:
    stage.skipped = True
    stage.summary = reason
