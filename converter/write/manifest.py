"""The manifest of a conversion, built from its decisions and the records of its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from codecllm.converter.options import ConvertOptions, Origin
from codecllm.converter.plan.choice import ParamsChoice
from codecllm.converter.plan.conversion_plan import ConversionPlan
from codecllm.converter.source.source import SourceModel
from codecllm.formats import WRITER_VERSION
from codecllm.formats.manifest.manifest import Manifest, features_of, source_features
from codecllm.formats.manifest.records import (
    AliasTensor,
    FileRecord,
    Options,
    ShardRecord,
    Source,
    StoredRecord,
    TensorRecord,
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """Everything that is decided before a byte is written.

    Attributes:
        model: the opened source.
        plan: of all its tensors.
        options: those of the user.
        choice: chosen quantization parameters.
        origin: where the source comes from.
    """

    model: SourceModel
    plan: ConversionPlan
    options: ConvertOptions
    choice: ParamsChoice
    origin: Origin


def build_manifest(
    conversion: Conversion,
    records: Sequence[StoredRecord],
    shards: list[ShardRecord],
    files: list[FileRecord],
) -> Manifest:
    """Returns the manifest.

    Args:
        conversion: its decisions.
        records: of all stored tensors, in any order.
        shards: of the shards, in order.
        files: of the side files.
    """
    model, choice = conversion.model, conversion.choice
    by_name: dict[str, TensorRecord] = {record.name: record for record in records}
    for name, target in conversion.plan.aliases.items():
        target_record = by_name[target]
        by_name[name] = AliasTensor(
            name=name,
            dtype=target_record.dtype,
            shape=target_record.shape,
            scheme="alias",
            alias_of=target,
        )
    options = _recorded_options(conversion.options, choice)
    origin = conversion.origin
    source_needs = source_features([file.name for file in files], model.quantization_method)
    return Manifest(
        format="codecllm",
        format_version=conversion.plan.format_version,
        required_features=[*features_of(records, options, choice.calibration), *source_needs],
        writer=writer_versions(),
        source=Source(
            repo=origin.repo,
            commit=origin.commit,
            tensor_bytes=model.tensor_bytes,
            quantization=model.quantization_method,
        ),
        options=options,
        calibration=choice.calibration,
        shards=shards,
        files=files,
        # In the source's order: the order in which records are ready depends on threads.
        tensors=[by_name[name] for name in model.tensors],
    )


def _recorded_options(options: ConvertOptions, choice: ParamsChoice) -> Options:
    rate = choice.rate
    calibrate = None if rate is None or rate.calibrate is None else str(rate.calibrate)
    return Options(
        scheme=options.scheme,
        # Absent for zstd, the only codec of format 1.0.
        codec="rans" if options.codec == "rans" else None,
        bits=None if rate is None else rate.target_bits,
        ratio=None if rate is None else rate.ratio,
        calibrate=calibrate,
        refine=True if rate is not None and rate.refine else None,
        include=list(options.include),
        exclude=list(options.exclude),
        non_finite=options.non_finite,
        max_shard_bytes=options.max_shard_bytes,
    )


def writer_versions() -> dict[str, str]:
    """Returns names and versions of the libraries that decide about the bytes of a container."""
    zstd = ".".join(str(part) for part in zstandard.ZSTD_VERSION)
    return {
        "codecllm": WRITER_VERSION,
        "numpy": np.__version__,
        "zstandard": zstandard.__version__,
        "zstd": zstd,
    }
