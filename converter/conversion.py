"""The conversion: plan every tensor, stream them through the encoder into shards, commit."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from codecllm.converter.options import (
    DEFAULT_MAX_SHARD_BYTES,
    ConvertOptions,
    NonFinite,
    Origin,
    Scheme,
)
from codecllm.converter.plan.choice import NO_CHOICE, ParamsChoice
from codecllm.converter.plan.conversion_plan import open_source, plan_conversion
from codecllm.converter.report import ConversionReport
from codecllm.converter.source.source import SourceModel
from codecllm.converter.write.container_writer import OnProgress, write_container
from codecllm.converter.write.fingerprint import fingerprint_of
from codecllm.converter.write.manifest import Conversion
from codecllm.converter.write.staging import Staging
from codecllm.formats.arguments.check import check_arguments, function, instance, optional
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.codecs import CodecName
from codecllm.formats.errors import UsageError
from codecllm.formats.files import as_path
from codecllm.formats.machine import without_garbage_collection
from codecllm.formats.manifest.manifest import MANIFEST_NAME, pack_manifest
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.formats.tiling import DEFAULT_TILE_SYMBOLS

# Room for the files that no plan counts: index, manifest and baseline.
_SPARE_BYTES = 64 << 20

Completion = Callable[[Path], str | None]
"""Adds side files to the staged container in a folder; returns a sentence for the user, or None."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    scheme: Scheme = "int8",
    codec: CodecName = "zstd",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    non_finite: NonFinite = "error",
    chunk_kib: int = DEFAULT_TILE_SYMBOLS >> 10,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    workers: int | None = None,
    force: bool = False,
    with_code: bool = False,
    choice: ParamsChoice = NO_CHOICE,
    progress: OnProgress | None = None,
) -> ConversionReport:
    """Converts a local model folder into a container, without a baseline.

    Args:
        source: folder with safetensors weights.
        out: folder to make; absent, empty, or a container with `force`.
        scheme: `int8` (one scale per output channel) or `lossless`.
        codec: `zstd` or `rans`.
        include: glob patterns of tensor names to quantize beside the default choice.
        exclude: glob patterns of tensor names not to quantize; they win over `include`.
        non_finite: `error` stops at NaN or infinite weights under int8, `lossless` keeps such
            tensors as they are.
        chunk_kib: most KiB of symbols in a chunk, 4 to 1024.
        max_shard_bytes: no shard is longer, unless one tensor is.
        workers: encoding threads; None takes one per core, at most 16. Never changes a byte.
        force: replace a container that is in the way.
        with_code: copy the repository's Python files.
        choice: chosen quantization parameters.
        progress: called as bytes are done.

    Raises:
        UsageError: an option is out of range.
        CodecLLMError, OSError: see `convert_model`.
    """
    options = ConvertOptions(
        scheme=scheme,
        codec=codec,
        include=include,
        exclude=exclude,
        non_finite=non_finite,
        chunk_kib=chunk_kib,
        max_shard_bytes=max_shard_bytes,
        workers=workers,
        force=force,
        with_code=with_code,
    )
    with open_source(source, options) as model:
        return convert_model(model, out, options, choice=choice, progress=progress)


def convert_model(
    model: SourceModel,
    out: str | Path,
    options: ConvertOptions,
    *,
    choice: ParamsChoice = NO_CHOICE,
    origin: Origin | None = None,
    progress: OnProgress | None = None,
    complete: Completion | None = None,
) -> ConversionReport:
    """Converts an opened source into a container, without a baseline.

    Args:
        model: the source.
        out: folder to make; absent, empty, or a container with `options.force`.
        options: of the conversion.
        choice: chosen quantization parameters; needed where `options` asks for a rate.
        origin: where the source comes from; None is a local folder.
        progress: called as bytes are done.
        complete: called with the whole container before it is moved into `out`. What it adds is
            there with the container or not at all; what it raises ends the conversion.

    Raises:
        SourceError: the source cannot be converted; NonFiniteWeightError names tensor, row and
            count.
        OutputExistsError: `out` holds something else.
        UsageError: the options ask for a rate, and no parameters were chosen.
        FormatError: the source's files are malformed.
        OSError: reading or writing failed. In every case nothing half-written stays.

    After a kill the same call goes on: finished shards are kept, and the result has the same bytes.
    """
    out = as_path(out, "out")  # before the plan, which may take long
    instance(ConvertOptions)(options, "options")
    instance(ParamsChoice)(choice, "choice")
    optional(function)(complete, "complete")
    check_arguments(progress=progress)
    if options.rate is not None and choice.provider is None:
        raise UsageError("a rate is asked for, and no quantization parameters were chosen")
    start_time = time.monotonic()
    # Many tensors make many objects that stay. A provider may run a model, which makes cycles.
    pausing = without_garbage_collection if choice.provider is None else nullcontext
    with pausing():
        plan = plan_conversion(model, options, accepts_params=choice.provider is not None)
    conversion = Conversion(model, plan, options, choice, origin or Origin())
    fingerprint = fingerprint_of(conversion)
    # The plan may still refuse the source: the output is not touched before.
    with Staging(out, force=options.force, fingerprint=fingerprint) as staging:
        finished_bytes = sum(shard.record.bytes for shard in staging.journal.finished.values())
        _check_space(staging.out, plan.max_stored_bytes + model.side_bytes - finished_bytes)
        with pausing():
            manifest = write_container(conversion, staging.folder, staging.journal, progress)
        # A source that was written to meanwhile gives a mixture of two models: refused before the
        # commit.
        model.check_unchanged()
        data = pack_manifest(manifest)
        staging.seal(data)
        notes = [*plan.warnings, *choice.notes]
        # A refinement's products may take gigabytes, and `complete` may load models.
        del choice, conversion
        if complete is not None:
            began = time.monotonic()
            note = complete(staging.folder)
            start_time += time.monotonic() - began  # no part of the conversion
            notes += [note] if note is not None else []
            data = (staging.folder / MANIFEST_NAME).read_bytes()
            manifest = parse_manifest(data)
        staging.commit()
    return ConversionReport(
        out=staging.out,
        manifest=manifest,
        manifest_sha256=sha256_hex(data),
        stored_bytes=len(data) + sum(shard.bytes for shard in manifest.shards),
        seconds=time.monotonic() - start_time,
        taken=model.describe_taken(),
        left=model.side_files.left,
        warnings=notes,
    )


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed + _SPARE_BYTES:
        message = (
            f"not enough space: up to {needed + _SPARE_BYTES} bytes are needed, {free} are free"
        )
        raise OSError(errno.ENOSPC, message, str(out))
