"""The conversion: plan every tensor, place them in shards, stream them through the encoder, commit."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import zstandard

from codecllm.converter.plan.policy import Scheme, plan_tensor
from codecllm.converter.plan.side_names import without_clashes
from codecllm.converter.plan.tensor_plan import ParamsProvider, TensorPlan
from codecllm.converter.source.aliases import find_aliases
from codecllm.converter.source.selection import LeftFile
from codecllm.converter.source.side_files import (
    copy_side_files,
    pack_config,
    pack_index,
    write_listed,
)
from codecllm.converter.source.source import SourceModel
from codecllm.converter.write.staging import Staging
from codecllm.converter.write.tensor_writer import NonFinite, StoredRecord, TensorWriter
from codecllm.formats import BASE_VERSION, FORMAT_VERSION, STEPS_VERSION, WRITER_VERSION
from codecllm.formats.checksums import sha256_hex, sha256_of_descriptor, xxh3_hex
from codecllm.formats.codecs import CodecName
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import UsageError
from codecllm.formats.files import SafeFile
from codecllm.formats.machine import cores
from codecllm.formats.manifest.manifest import (
    CODE_SUFFIX,
    INDEX_NAME,
    Manifest,
    features_of,
    pack_manifest,
    shard_name,
    source_features,
)
from codecllm.formats.manifest.records import (
    AliasTensor,
    Calibration,
    FileRecord,
    Int8Tensor,
    LosslessTensor,
    Options,
    ShardRecord,
    Source,
    TensorRecord,
)
from codecllm.formats.shards.shard_writer import PlannedTensor, ShardWriter
from codecllm.formats.shards.side_tensors import side_names
from codecllm.formats.tiling import DEFAULT_TILE_SYMBOLS

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
_SPARE_BYTES = 64 << 20

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, the source bytes done and the source bytes in all."""


MIN_CHUNK_KIB, MAX_CHUNK_KIB = 4, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What a conversion is asked for.

    Attributes:
        scheme: `int8` (per output channel) or `lossless`.
        codec: `zstd`, or `rans`: smaller, made for decoding on a GPU, slow to decode on a CPU.
        include: glob patterns of tensor names to quantize beside the default choice.
        exclude: glob patterns of tensor names not to quantize; they win.
        non_finite: `error` stops at NaN or infinite weights under int8, `lossless` keeps such tensors as they are.
        chunk_kib: most KiB of symbols in a chunk, 4 to 1024. Small chunks give a GPU more of them to decode at once, and cost a
            little size: more checksums and, with zstd, more code tables.
        max_shard_bytes: no shard is longer, unless one tensor is.
        workers: encoding threads, 1 or more; None takes one per core. Does not change a byte of the output.
        force: replace a container that is in the way.
        with_code: copy the repository's Python files (`auto_map`). They run only where a loading caller passes
            `trust_remote_code=True`.
        repo: Hub repository the source came from, recorded in the manifest.
        commit: its commit, 40 hex digits.
        steps: chooses the steps of each int8 tensor; None takes them from the largest weight of each channel.
        bits, ratio, calibrate, refine: what `steps` was asked for, recorded in the manifest and otherwise without effect.
        calibration: the text from which `steps` learned, recorded in the manifest.
    """

    scheme: Scheme = "int8"
    codec: CodecName = "zstd"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    non_finite: NonFinite = "error"
    chunk_kib: int = DEFAULT_TILE_SYMBOLS >> 10
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    workers: int | None = None
    force: bool = False
    with_code: bool = False
    repo: str | None = None
    commit: str | None = None
    steps: ParamsProvider | None = None
    bits: float | None = None
    ratio: float | None = None
    calibrate: str | None = None
    refine: bool | None = None
    calibration: Calibration | None = None

    @property
    def format_version(self) -> str:
        """The lowest version of the format (above 1.0) that these options need: 1.2 where steps are chosen."""
        new = (self.steps, self.bits, self.ratio, self.calibrate, self.refine, self.calibration)
        return BASE_VERSION if all(value is None for value in new) else STEPS_VERSION

    def threads(self) -> int:
        """Returns the number of encoding threads.

        Raises:
            UsageError: `workers` or `max_shard_bytes` is not positive, or `chunk_kib` out of its range.
        """
        if not MIN_CHUNK_KIB <= self.chunk_kib <= MAX_CHUNK_KIB:
            raise UsageError(
                "chunk_kib is out of range",
                got=self.chunk_kib,
                expected=f"{MIN_CHUNK_KIB} to {MAX_CHUNK_KIB}",
            )
        if self.max_shard_bytes < 1:
            raise UsageError("max_shard_bytes must be positive", got=self.max_shard_bytes)
        if self.workers is None:
            return cores()
        if self.workers < 1:
            raise UsageError("workers must be 1 or more", got=self.workers)
        return self.workers


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        out: the container.
        manifest: its manifest.
        manifest_sha256: the value to pin.
        stored_bytes: bytes of shards and manifest.
        seconds: how long it took.
        taken: which files were taken as the model's weights, in one line.
        left: files and folders of the source that are not in the container, and why.
        warnings: sentences for the user.
    """

    out: Path
    manifest: Manifest
    manifest_sha256: str
    stored_bytes: int
    seconds: float
    taken: str = ""
    left: list[LeftFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Bytes of the source's tensors / bytes of shards and manifest."""
        return self.manifest.source.tensor_bytes / self.stored_bytes

    @property
    def weights(self) -> int:
        """Number of weights, aliases not counted."""
        return sum(
            record.elements
            for record in self.manifest.tensors
            if not isinstance(record, AliasTensor)
        )

    @property
    def bits_per_weight(self) -> float:
        """All stored bits / weights."""
        return 8 * self.stored_bytes / max(1, self.weights)

    @property
    def quantized_bits_per_weight(self) -> float:
        """All stored bits but the data of tensors that are not quantized / quantized weights; 0 where there are none."""
        kept = quantized = 0
        for record in self.manifest.tensors:
            if isinstance(record, Int8Tensor):
                quantized += record.elements
            elif isinstance(record, LosslessTensor):
                kept += sum(plane.stored_bytes for plane in record.planes)
            elif not isinstance(record, AliasTensor):
                kept += record.source_bytes
        return 8 * (self.stored_bytes - kept) / quantized if quantized else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions of a conversion, before a byte is written.

    Attributes:
        shards: plans of the tensors of each shard, in order.
        aliases: name -> name of the tensor whose bytes it shares.
        warnings: sentences for the user.
        format_version: the lowest version of the format (above 1.0) that says what will be written.
    """

    shards: list[list[TensorPlan]]
    aliases: dict[str, str]
    warnings: list[str]
    format_version: str

    @property
    def tensors(self) -> list[TensorPlan]:
        """All stored tensors in order."""
        return [plan for shard in self.shards for plan in shard]

    @property
    def max_stored_bytes(self) -> int:
        """Upper bound of the output without side files and fallbacks."""
        return sum(plan.max_stored_bytes for plan in self.tensors)


def convert(
    source: str | Path, out: str | Path, *, progress: Progress | None = None, **options: object
) -> ConversionReport:
    """Converts a local model folder into a container.

    Args:
        source: folder with safetensors weights.
        out: folder to make; absent, empty, or a container with `force`.
        progress: called as bytes are done.
        options: fields of `ConvertOptions`.

    Returns:
        What was done. The container is complete, without a baseline.

    Raises:
        SourceError: the source cannot be converted; NonFiniteWeightError names tensor, row and count.
        OutputExistsError: `out` holds something else.
        FormatError: the source's files are malformed.
        OSError: reading or writing failed. In every case nothing half-written stays.
    """
    chosen = ConvertOptions(**options)  # type: ignore[arg-type]
    threads = chosen.threads()
    started = time.monotonic()
    with SourceModel(source, view=chosen.scheme, with_code=chosen.with_code) as model:
        plan = plan_conversion(model, chosen)
        with Staging(out, force=chosen.force) as staging:
            _check_space(staging.out, plan.max_stored_bytes + model.side_bytes)
            manifest = _write(model, plan, chosen, threads, staging.folder, progress)
            model.check_unchanged()
            data = pack_manifest(manifest)
            staging.commit(data)
    return ConversionReport(
        out=Path(out),
        manifest=manifest,
        manifest_sha256=sha256_hex(data),
        stored_bytes=len(data) + sum(shard.bytes for shard in manifest.shards),
        seconds=time.monotonic() - started,
        taken=model.describe_taken(),
        left=model.side_files.left,
        warnings=plan.warnings,
    )


def plan_conversion(model: SourceModel, options: ConvertOptions) -> Plan:
    """Decides scheme, alias and shard of every tensor of an opened source."""
    plans = [
        plan_tensor(
            tensor,
            options.scheme,
            options.include,
            options.exclude,
            model.model_type,
            options.codec,
            accepts_params=options.steps is not None,
            tile_symbols=options.chunk_kib << 10,
        )
        for tensor in model.tensors.values()
    ]
    plans = without_clashes(plans)
    aliases = find_aliases(plans)
    warnings = [*model.notes, *_remarks(model, options)]
    for option, patterns in (("--include", options.include), ("--exclude", options.exclude)):
        warnings += [
            f"{option} {pattern!r} matches no tensor" for pattern in _unmatched(patterns, model)
        ]
    stored = [plan for plan in plans if plan.source.name not in aliases]
    features = source_features(model.side_files.copied, model.quantization_method)
    version = FORMAT_VERSION if features else options.format_version
    return Plan(_place(stored, options.max_shard_bytes), aliases, warnings, version)


def _remarks(model: SourceModel, options: ConvertOptions) -> list[str]:
    """Returns sentences about what the container will lack, or has from elsewhere."""
    remarks = []
    if model.config is None:
        remarks.append("the source has no config.json: it cannot be loaded as a model")
    side_files = model.side_files
    if side_files.linked:
        count = len(side_files.linked)
        remarks.append(
            f"{count} copied files are links to places outside the source's folder, first {side_files.linked[0]}"
        )
    if options.with_code and not any(name.endswith(CODE_SUFFIX) for name in side_files.copied):
        remarks.append("--with-code: the source holds no Python files")
    if not options.with_code and model.names_code:
        count = len(side_files.code)
        remarks.append(
            f"the config names code of the repository (auto_map): {count} Python files are left out; "
            "--with-code copies them"
        )
    return remarks


def _unmatched(patterns: Sequence[str], model: SourceModel) -> list[str]:
    return [
        pattern
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in model.tensors)
    ]


def _place(plans: list[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Cuts the tensors into shards by the upper bounds of their sizes, so that names are known before anything is written."""
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in plans:
        size = plan.max_stored_bytes + 512
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(plan)
        filled += size
    return shards


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed + _SPARE_BYTES:
        message = (
            f"not enough space: up to {needed + _SPARE_BYTES} bytes are needed, {free} are free"
        )
        raise OSError(errno.ENOSPC, message, str(out))


def _write(
    model: SourceModel,
    plan: Plan,
    options: ConvertOptions,
    threads: int,
    folder: Path,
    progress: Progress | None,
) -> Manifest:
    total = sum(tensor.source.entry.bytes for tensor in plan.tensors)
    done = 0

    def on_bytes(name: str, count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(name, done, total)

    executor = ThreadPoolExecutor(threads, thread_name_prefix="codecllm-encode")
    try:
        writer = TensorWriter(
            executor, 2 * threads + 2, options.non_finite, on_bytes, options.steps
        )
        records, shards = [], []
        for number, plans in enumerate(plan.shards):
            path = folder / shard_name(number + 1, len(plan.shards))
            written, head, size = _write_shard(writer, plans, path, number, plan.format_version)
            records += written
            digest = executor.submit(_hash_file, folder, path.name)
            shards.append((path.name, head, size, digest))
        shard_records = [
            ShardRecord(name=name, bytes=size, sha256=digest.result(), header_xxh3=xxh3_hex(head))
            for name, head, size, digest in shards
        ]
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    files = _write_side_files(model, plan, records, shard_records, options, folder)
    return build_manifest(model, plan, options, records, shard_records, files)


def _write_shard(
    writer: TensorWriter, plans: list[TensorPlan], path: Path, number: int, version: str
) -> tuple[list[StoredRecord], bytes, int]:
    shard = ShardWriter(path, planned_entries(plans), shard_metadata(version))
    try:
        records = list(writer.write_all(plans, shard, number))
        head, size = shard.finish()
    except BaseException:
        shard.abort()
        raise
    return records, head, size


def shard_metadata(version: str) -> dict[str, str]:
    """Returns the strings that a shard's header holds."""
    return {"format": "pt", "codecllm.format_version": version}


def planned_entries(plans: list[TensorPlan]) -> list[PlannedTensor]:
    """Returns the entries that the shard's header may have to hold, each at its longest."""
    planned = []
    for plan in plans:
        source = plan.source
        bound = max(plan.max_stored_bytes, source.entry.bytes)
        if plan.scheme == "raw":
            planned.append(PlannedTensor(source.name, source.dtype, source.shape, bound))
            continue
        planned.append(PlannedTensor(source.name, DTYPES["U8"], (bound,), bound))
        layout = plan.longest_layout
        for side in plan.possible_sides:
            length = side.length(layout)
            shape = (bound if length is None else length,)
            dtype = DTYPES[side.dtype(layout)]
            planned.append(PlannedTensor(side.name_for(source.name), dtype, shape, 0))
    return planned


def _hash_file(folder: Path, name: str) -> str:
    with SafeFile(folder, name) as file:
        return sha256_of_descriptor(file.descriptor)[0]


def _write_side_files(
    model: SourceModel,
    plan: Plan,
    records: list[StoredRecord],
    shards: list[ShardRecord],
    options: ConvertOptions,
    folder: Path,
) -> list[FileRecord]:
    files = copy_side_files(model.repository, model.side_files, model.modules, folder)
    if model.config is not None:
        files.append(
            write_listed(
                folder,
                "config.json",
                pack_config(
                    model.config, options.scheme, plan.format_version, model.original_block
                ),
            )
        )
    weight_map = {}
    for record in records:
        weight_map.update(
            dict.fromkeys([record.name, *side_names(record)], shards[record.shard].name)
        )
    parameters = sum(record.elements for record in records)
    files.append(
        write_listed(
            folder, INDEX_NAME, pack_index(weight_map, sum(s.bytes for s in shards), parameters)
        )
    )
    return sorted(files, key=lambda record: record.name)


def build_manifest(
    model: SourceModel,
    plan: Plan,
    options: ConvertOptions,
    records: list[StoredRecord],
    shards: list[ShardRecord],
    files: list[FileRecord],
) -> Manifest:
    """Returns the manifest for the records of all stored tensors, in any order, of the shards and of the side files."""
    by_name: dict[str, TensorRecord] = {record.name: record for record in records}
    for name, target in plan.aliases.items():
        stored = by_name[target]
        by_name[name] = AliasTensor(
            name=name, dtype=stored.dtype, shape=stored.shape, scheme="alias", alias_of=target
        )
    asked = Options(
        scheme=options.scheme,
        codec="rans" if options.codec == "rans" else None,
        bits=options.bits,
        ratio=options.ratio,
        calibrate=options.calibrate,
        refine=options.refine,
        include=list(options.include),
        exclude=list(options.exclude),
        non_finite=options.non_finite,
        max_shard_bytes=options.max_shard_bytes,
    )
    return Manifest(
        format="codecllm",
        format_version=plan.format_version,
        required_features=features_of(records, asked, options.calibration)
        + source_features([record.name for record in files], model.quantization_method),
        writer=_writer_versions(),
        source=Source(
            repo=options.repo,
            commit=options.commit,
            tensor_bytes=model.tensor_bytes,
            quantization=model.quantization_method,
        ),
        options=asked,
        calibration=options.calibration,
        shards=shards,
        files=files,
        tensors=[by_name[name] for name in model.tensors],
    )


def _writer_versions() -> dict[str, str]:
    zstd = ".".join(str(part) for part in zstandard.ZSTD_VERSION)
    return {
        "codecllm": WRITER_VERSION,
        "numpy": np.__version__,
        "zstandard": zstandard.__version__,
        "zstd": zstd,
    }
