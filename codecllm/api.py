"""The functions behind the command line: convert, predict and export, from a name or a folder."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from codecllm.converter.conversion import convert_model
from codecllm.converter.exports import gguf
from codecllm.converter.exports.compressed_tensors import PackedLayout, plan_layout
from codecllm.converter.exports.export import ExportReport
from codecllm.converter.exports.export import export as export_folder
from codecllm.converter.options import (
    DEFAULT_MAX_SHARD_BYTES,
    MAX_CODE_BITS,
    MIN_CODE_BITS,
    ConvertOptions,
    NonFinite,
    Origin,
    Quality,
    Scheme,
    requested_rate,
)
from codecllm.converter.plan.conversion_plan import open_source
from codecllm.converter.rate.estimate import Estimate, estimate_model
from codecllm.converter.report import ConversionReport
from codecllm.converter.source.modules import read_modules
from codecllm.converter.write.container_writer import OnProgress
from codecllm.formats.arguments.check import check_arguments, choice, instance, integer, optional
from codecllm.formats.codecs import CodecName
from codecllm.formats.container import Container
from codecllm.formats.errors import BaselineError, UsageError
from codecllm.formats.files import as_path
from codecllm.formats.tiling import DEFAULT_TILE_SYMBOLS
from codecllm.hub import ModelFiles, resolve
from codecllm.quality import choose_params, on_known_device

if TYPE_CHECKING:
    from codecllm.verifier.baseline.baseline import BaselineOutcome

ExportFormat = Literal["safetensors", "compressed-tensors", "gguf"]


@dataclass(frozen=True, slots=True)
class Converted:
    """A finished conversion.

    Attributes:
        report: of the conversion.
        manifest_sha256: sha256 of the manifest, baseline included: the value to pin.
        baseline: the recorded baseline, or None where none was asked for.
    """

    report: ConversionReport
    manifest_sha256: str
    baseline: BaselineOutcome | None


def convert(
    model: str | Path,
    out: str | Path,
    *,
    scheme: Scheme = "int8",
    codec: CodecName = "zstd",
    bits: float | None = None,
    ratio: float | None = None,
    quality: Quality | None = None,
    code_bits: int | None = None,
    calibrate: str | Path | None = None,
    refine: bool = False,
    column_scales: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    non_finite: NonFinite = "error",
    chunk_kib: int = DEFAULT_TILE_SYMBOLS >> 10,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    workers: int | None = None,
    force: bool = False,
    with_code: bool = False,
    device: str = "cpu",
    baseline: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    progress: OnProgress | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Converted:
    """Converts a model into a container and records its baseline output.

    Without `bits`, `ratio` or `quality` the steps of int8 tensors follow from the largest weight of
    each channel. With one of them they are chosen such that the container has that rate, and such
    that bits go where the model is sensitive.

    Args:
        model: a Hub id or a local folder with safetensors weights.
        out: folder to make.
        scheme: `int8` (one scale per output channel) or `lossless`.
        codec: `zstd`, or `rans`: smaller, fastest on a GPU, and on a CPU slow without the native
            core.
        bits: bits per quantized weight, everything counted, 2 to 8.
        ratio: source bytes / stored bytes.
        quality: `high`, `balanced` or `small`: names for bits, see
            `codecllm.converter.options.QUALITIES`.
        code_bits: bits that hold every code of a linear layer, 2 to 8, in place of a rate: for
            `export(format="compressed-tensors")` of that width (docs/exports.md).
        calibrate: text from which the sensitivities come, where a rate is asked for: `text` (of
            several kinds, part of the package), `self` (the model writes it), `random` (random
            tokens), `none`, or a text file. None is `text`, or `none` where the model cannot run
            here.
        refine: choose codes of linear layers with error feedback: fewer bits at equal quality, and
            a conversion that takes longer. Needs a rate and a calibration.
        column_scales: whether columns may get scales, and codes more than 8 bits, where a rate is
            asked for. False is for `export(format="compressed-tensors")`, which cannot hold them;
            it costs quality (docs/bits.md).
        include: glob patterns of tensor names to quantize beside the default choice.
        exclude: glob patterns of tensor names not to quantize; they win over `include`.
        non_finite: `error` stops at NaN or infinite weights under int8, `lossless` keeps such
            tensors as they are.
        chunk_kib: most KiB of symbols in a chunk, 4 to 1024.
        max_shard_bytes: no shard is longer, unless one tensor is.
        workers: encoding threads; None takes one per core, at most 16. Never changes a byte.
        force: replace a container that is in the way.
        with_code: copy the repository's Python files (`auto_map`). They run only where a loading
            caller passes `trust_remote_code=True`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`: where the model runs that a rate is chosen by,
            where its codes are refined, and where the baseline runs. Another device may give other
            bytes.
        baseline: True records in any case, False never, None where the source fits in memory and it
            takes under 10 minutes.
        revision: branch, tag or commit of a Hub id; the commit it leads to is recorded.
        token: Hub token.
        cache_dir: Hub cache.
        progress: called with a tensor's name, bytes done and bytes in all.
        on_stage: called with a sentence when a stage begins.

    Raises:
        UsageError: options contradict each other, or one is out of range.
        CodecLLMError: see `codecllm.converter.convert_model` and `codecllm.hub.resolve`.
    """
    options = ConvertOptions(
        scheme=scheme,
        codec=codec,
        rate=requested_rate(bits, ratio, quality, code_bits, calibrate, refine, column_scales),
        include=include,
        exclude=exclude,
        non_finite=non_finite,
        chunk_kib=chunk_kib,
        max_shard_bytes=max_shard_bytes,
        workers=workers,
        force=force,
        with_code=with_code,
        device=device,
    )
    access = HubAccess(revision, token, cache_dir)
    return run_conversion(
        model, out, options, access, baseline=baseline, progress=progress, on_stage=on_stage
    )


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How a Hub id is read.

    Attributes:
        revision: branch, tag or commit.
        token: Hub token.
        cache_dir: Hub cache.

    Raises:
        UsageError: a field is of a wrong type.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_arguments(revision=self.revision, token=self.token, cache_dir=self.cache_dir)


LOCAL_ACCESS = HubAccess()


def run_conversion(
    model: str | Path,
    out: str | Path,
    options: ConvertOptions,
    access: HubAccess = LOCAL_ACCESS,
    *,
    baseline: bool | None = None,
    progress: OnProgress | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Converted:
    """Converts as `convert` does, with packed options."""
    out = as_path(out, "out")  # before a model is fetched and calibrated
    instance(ConvertOptions)(options, "options")
    instance(HubAccess)(access, "access")
    check_arguments(baseline=baseline, progress=progress, on_stage=on_stage)
    options = on_known_device(options)
    files = _resolve_source(model, access)
    completion = _Completion(files.folder, options.device, baseline, on_stage)
    report = _convert_source(files, out, options, completion, progress, on_stage)
    if completion.failure is not None:
        completion.failure.add_note(f"the container in {out} is complete, without a baseline")
        raise completion.failure
    return Converted(report, report.manifest_sha256, completion.outcome)


class _Completion:
    """Adds load report and baseline to a container before it is moved into place.

    Attributes:
        outcome: of recording the baseline, or None.
        failure: why a baseline that was begun is not there, or None.
        block_dropped: whether the source's config had a quantization block that no tensor showed.
    """

    def __init__(
        self,
        source: Path,
        device: str,
        baseline: bool | None,
        on_stage: Callable[[str], None] | None,
    ) -> None:
        self.outcome: BaselineOutcome | None = None
        self.failure: BaseException | None = None
        self.block_dropped = False
        self._source = source
        self._device = device
        self._baseline = baseline
        self._on_stage = on_stage

    def __call__(self, folder: Path) -> str | None:
        # Imported late: they may need torch, which a prediction does not.
        from codecllm.verifier import record_baseline
        from codecllm.verifier.load_report import record_load_report

        note = record_load_report(folder, block_dropped=self.block_dropped)
        if self._baseline is False:
            return note
        # What was chosen hangs in cycles of the conversion's threads: both models need the memory.
        gc.collect()
        # transformers loads the folder of the main module, which need not be the root.
        main_folder = self._source / read_modules(self._source).main
        try:
            self.outcome = record_baseline(
                folder,
                main_folder,
                required=self._baseline is True,
                device=self._device,
                on_stage=self._on_stage,
            )
        except BaseException as exc:
            # The container is whole without it, and `codecllm diagnose` needs one to find the
            # cause. A signal too ends what takes minutes; to convert may have taken hours.
            if isinstance(exc, Exception) and not isinstance(exc, (BaselineError, MemoryError)):
                raise
            self.failure = exc
        return note


def predict(
    model: str | Path,
    options: ConvertOptions,
    access: HubAccess = LOCAL_ACCESS,
    *,
    on_stage: Callable[[str], None] | None = None,
) -> Estimate:
    """Predicts the sizes that a conversion would give; nothing is written. Errors as `convert`."""
    instance(ConvertOptions)(options, "options")
    instance(HubAccess)(access, "access")
    check_arguments(on_stage=on_stage)
    options = on_known_device(options)
    files = _resolve_source(model, access)
    with open_source(files.folder, options) as source:
        return estimate_model(source, options, choose_params(source, options, on_stage))


def _resolve_source(model: str | Path, access: HubAccess) -> ModelFiles:
    return resolve(
        model,
        revision=access.revision,
        token=access.token,
        cache_dir=access.cache_dir,
        kind="source",
    )


def _convert_source(
    files: ModelFiles,
    out: str | Path,
    options: ConvertOptions,
    completion: _Completion,
    progress: OnProgress | None,
    on_stage: Callable[[str], None] | None,
) -> ConversionReport:
    with open_source(files.folder, options) as source:
        completion.block_dropped = source.block_dropped
        return convert_model(
            source,
            out,
            options,
            # Held by no name here: it is released before the completion loads models.
            choice=choose_params(source, options, on_stage),
            origin=Origin(files.repo, files.commit),
            progress=progress,
            complete=completion,
        )


def export(
    container: str | Path,
    out: str | Path,
    *,
    format: ExportFormat = "safetensors",
    width: int | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    workers: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    progress: OnProgress | None = None,
) -> ExportReport:
    """Writes the model of a container (a folder or Hub id) for other programs to read.

    Args:
        container: folder or Hub id.
        out: folder to make.
        format: `safetensors`: a plain model in the source's dtypes. `compressed-tensors`: int8
            weights of linear modules keep codes and scales, in that library's `pack-quantized`
            layout; everything else is plain. `gguf`: refused, with the reason.
        width: bits of a packed code, 2 to 8, for `compressed-tensors`; None takes the fewest that
            hold all codes.
        max_shard_bytes: no weight file is longer, unless one tensor is.
        workers: decoding threads; None takes one per core.
        revision: branch, tag or commit of a Hub id.
        token: Hub token.
        cache_dir: Hub cache.
        progress: called with a tensor's name, bytes done and bytes in all.

    Raises:
        UsageError: the format cannot hold the tensors of the container.
        CodecLLMError: see `codecllm.converter.exports.export` and `codecllm.hub.resolve`.
    """
    as_path(out, "out")  # before a container is fetched and its codes are counted
    choice(get_args(ExportFormat))(format, "format")
    width = optional(integer(MIN_CODE_BITS, MAX_CODE_BITS))(width, "width")
    check_arguments(max_shard_bytes=max_shard_bytes, workers=workers, progress=progress)
    if width is not None and format != "compressed-tensors":
        raise UsageError("width goes with format 'compressed-tensors'", got=repr(format))
    folder = resolve(container, revision=revision, token=token, cache_dir=cache_dir).folder
    layout = None
    with Container(folder) as opened_container:
        if format == "gguf":
            gguf.refuse(opened_container)
        if format == "compressed-tensors":
            layout = _packed_layout(opened_container, width, workers)
    return export_folder(
        folder,
        out,
        layout=layout,
        max_shard_bytes=max_shard_bytes,
        workers=workers,
        progress=progress,
    )


def _packed_layout(container: Container, width: int | None, workers: int | None) -> PackedLayout:
    """Returns the layout; the model class is asked only where there are int8 tensors to pack."""
    manifest = container.manifest
    modules: list[str] = []
    if manifest.file("config.json") is not None and manifest.options.scheme == "int8":
        from codecllm.loader.hf.plain import linear_modules

        modules = linear_modules(container)
    return plan_layout(container, modules, width=width, workers=workers)
