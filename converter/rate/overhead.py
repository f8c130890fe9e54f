"""The bytes of a container beside chunks and their records: side tensors, headers, manifest.

They are known before anything is encoded: they are counted on placeholder records of the same
length as the real ones; only numbers may come out some digits shorter.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from codecllm.converter.plan.conversion_plan import planned_entries
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.source import SourceModel
from codecllm.converter.write.lanes import shard_metadata
from codecllm.converter.write.manifest import Conversion, build_manifest
from codecllm.converter.write.records import EncodedTensor, coded_record, raw_record
from codecllm.formats.codecs import CODEC_IDS
from codecllm.formats.limits import SLOT_ALIGNMENT
from codecllm.formats.manifest.manifest import INDEX_NAME, pack_manifest, record_bytes, shard_name
from codecllm.formats.manifest.records import (
    FileRecord,
    ShardRecord,
    SideChecksums,
    StoredRecord,
)
from codecllm.formats.shards.chunk_table import HEADER, RECORD
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES
from codecllm.formats.shards.shard_writer import reserved_header_bytes
from codecllm.formats.shards.side_tensors import SIDE_TENSORS

# Placeholders: only the number of their digits counts.
_DIGEST, _CHECKSUM = "0" * 64, "0" * 16
_FLOAT, _WORST_STEPS, _TABLES_BYTES = 0.012345678, 0.50012345, 12345
_FILE_BYTES, _SHARD_BYTES = 10**4, 10**9


def tensor_bytes(plan: TensorPlan, params: QuantParams, *, wide: bool = False) -> int:
    """Returns the bytes of an `int8` tensor beside chunks, chunk records and `rans` tables.

    Side tensors and manifest record.

    Args:
        plan: the tensor's, without parameters.
        params: its parameters; only their side tensors and their tiles matter.
        wide: whether its codes take two planes.
    """
    final_plan = replace(plan, params=params, wide=wide)
    return (
        params.stored_bytes + _fixed_bytes(final_plan) + record_bytes(_placeholder(final_plan, 0))
    )


def planned_record_bytes(plan: TensorPlan) -> int:
    """Returns the bytes of a tensor's manifest record."""
    return record_bytes(_placeholder(plan, 0))


def frame_bytes(conversion: Conversion, counted: Collection[str]) -> int:
    """Returns the bytes that are in no tensor's own account.

    Headers, and the manifest without the records of `counted`.

    Of tensors that are not `counted`, shape and chunk table are added; their data are not.

    Args:
        conversion: its decisions; no tensor has parameters yet.
        counted: names of the tensors whose records and side tensors are counted elsewhere
            (`tensor_bytes`).
    """
    shards = conversion.plan.shards
    metadata = shard_metadata(conversion.plan.format_version)
    headers = sum(
        PREFIX_BYTES + reserved_header_bytes(planned_entries(plans), metadata) for plans in shards
    )
    numbered_plans = [(number, plan) for number, plans in enumerate(shards) for plan in plans]
    records = {plan.source.name: _placeholder(plan, number) for number, plan in numbered_plans}
    manifest = build_manifest(
        conversion,
        list(records.values()),
        _placeholder_shards(len(shards)),
        _placeholder_files(conversion.model),
    )
    counted_records = sum(record_bytes(records[name]) for name in counted)
    other_sides = sum(
        _fixed_bytes(plan) + _chunk_bytes(plan)
        for _, plan in numbered_plans
        if plan.source.name not in counted
    )
    return headers + len(pack_manifest(manifest)) - counted_records + other_sides


def _placeholder_shards(count: int) -> list[ShardRecord]:
    return [
        ShardRecord(
            name=shard_name(number, count),
            bytes=_SHARD_BYTES,
            sha256=_DIGEST,
            header_xxh3=_CHECKSUM,
        )
        for number in range(1, count + 1)
    ]


def _placeholder_files(model: SourceModel) -> list[FileRecord]:
    names = [*model.side_files.copied, INDEX_NAME]
    if model.config is not None:
        names.append("config.json")
    return [FileRecord(name=name, bytes=_FILE_BYTES, sha256=_DIGEST) for name in sorted(names)]


def _fixed_bytes(plan: TensorPlan) -> int:
    """Returns the bytes of `X_shape` and of the head of `X_chunks`."""
    return 0 if plan.scheme == "raw" else 8 * len(plan.source.shape) + HEADER.itemsize


def _chunk_bytes(plan: TensorPlan) -> int:
    """Returns the bytes of chunk records and padding."""
    if plan.scheme == "raw":
        return 0
    # Padding to a slot takes half the alignment on average.
    return len(plan.grid) * plan.planes * (RECORD.itemsize + SLOT_ALIGNMENT // 2)


def _placeholder(plan: TensorPlan, shard: int) -> StoredRecord:
    """Returns a record as long as that of the tensor will be."""
    if plan.scheme == "raw":
        return raw_record(plan, shard, _DIGEST, _CHECKSUM)
    chunks = np.zeros(len(plan.grid) * plan.planes, RECORD)
    chunks["codec"] = CODEC_IDS[plan.codec]
    chunks["stored_bytes"] = plan.source.entry.elements // len(plan.grid)
    tensor = EncodedTensor(
        plan=plan,
        chunks=chunks,
        entropy_bits=np.full(plan.planes, 8.0 * plan.source.entry.elements),
        scales=np.full(plan.channels, _FLOAT, np.float32) if plan.scheme == "int8" else None,
        worst_error=_FLOAT,
        worst_steps=_WORST_STEPS,
    )
    layout, scale_sides = plan.layout, tensor.scale_sides()
    present = [
        side.key
        for side in SIDE_TENSORS
        if side.presence(layout) == "always" or side.key in scale_sides
    ]
    checksums = SideChecksums(**dict.fromkeys(present, _CHECKSUM))
    tables_bytes = _TABLES_BYTES if layout.rans else None
    return coded_record(tensor, shard, checksums, tables_bytes, _DIGEST)
