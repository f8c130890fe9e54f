"""What a container spends beside chunks and their records: side tensors, headers, manifest. Known before anything is encoded.

Records of tensors are made of stand-ins as long as what they stand for; only numbers may come out some digits shorter.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from codecllm.converter.conversion import (
    ConvertOptions,
    Plan,
    build_manifest,
    planned_entries,
    shard_metadata,
)
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.source import SourceModel
from codecllm.converter.write.records import coded_record, raw_record, scale_sides
from codecllm.converter.write.tensor_writer import StoredRecord
from codecllm.formats.codecs import CODEC_IDS
from codecllm.formats.limits import SLOT_ALIGNMENT
from codecllm.formats.manifest.manifest import INDEX_NAME, pack_manifest, record_bytes, shard_name
from codecllm.formats.manifest.records import FileRecord, ShardRecord, SideChecksums
from codecllm.formats.shards.chunk_table import HEADER, RECORD
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES
from codecllm.formats.shards.shard_writer import reserved_header_bytes
from codecllm.formats.shards.side_tensors import SIDE_TENSORS

_DIGEST, _CHECKSUM, _FLOAT, _TABLES_BYTES = "0" * 64, "0" * 16, 0.012345678, 12345


def tensor_bytes(plan: TensorPlan, params: QuantParams, *, wide: bool = False) -> int:
    """Returns the bytes of an `int8` tensor beside chunks, chunk records and `rans` tables: side tensors and manifest record.

    Args:
        plan: the tensor's, without steps.
        params: its parameters; only their side tensors and their tiles matter.
        wide: whether its codes take two planes.
    """
    chosen = replace(plan, params=params, wide=wide)
    return params.stored_bytes + _fixed_bytes(chosen) + record_bytes(_stand_in(chosen, 0))


def frame_bytes(model: SourceModel, plan: Plan, options: ConvertOptions, counted: set[str]) -> int:
    """Returns the bytes that belong to no tensor under chosen steps, data of other tensors left out.

    Args:
        model: the source.
        plan: of the conversion; its tensors have no steps yet.
        options: of the conversion, with what the manifest repeats of the request.
        counted: names of the tensors that `tensor_bytes` counts.
    """
    version = plan.format_version
    headers = [
        PREFIX_BYTES + reserved_header_bytes(planned_entries(plans), shard_metadata(version))
        for plans in plan.shards
    ]
    placed = [(number, one) for number, plans in enumerate(plan.shards) for one in plans]
    records = {one.source.name: _stand_in(one, number) for number, one in placed}
    shards = [
        ShardRecord(
            name=shard_name(number, len(plan.shards)),
            bytes=10**9,
            sha256=_DIGEST,
            header_xxh3=_CHECKSUM,
        )
        for number in range(1, len(plan.shards) + 1)
    ]
    names = sorted(
        [
            *model.side_files.copied,
            *(["config.json"] if model.config is not None else []),
            INDEX_NAME,
        ]
    )
    files = [FileRecord(name=name, bytes=10**4, sha256=_DIGEST) for name in names]
    manifest = build_manifest(model, plan, options, list(records.values()), shards, files)
    own = sum(record_bytes(records[name]) for name in counted)
    kept = sum(
        _fixed_bytes(one) + _chunk_bytes(one) for _, one in placed if one.source.name not in counted
    )
    return sum(headers) + len(pack_manifest(manifest)) - own + kept


def _fixed_bytes(plan: TensorPlan) -> int:
    """Returns the bytes of `X_shape` and of the head of `X_chunks`."""
    return 0 if plan.scheme == "raw" else 8 * len(plan.source.shape) + HEADER.itemsize


def _chunk_bytes(plan: TensorPlan) -> int:
    """Returns the bytes of chunk records and padding."""
    return (
        0
        if plan.scheme == "raw"
        else len(plan.grid) * plan.planes * (RECORD.itemsize + SLOT_ALIGNMENT // 2)
    )


def _stand_in(plan: TensorPlan, number: int) -> StoredRecord:
    if plan.scheme == "raw":
        return raw_record(plan, number, _DIGEST, _CHECKSUM)
    chunks = np.zeros(len(plan.grid) * plan.planes, RECORD)
    chunks["codec"] = CODEC_IDS[plan.codec]
    chunks["stored_bytes"] = plan.source.entry.elements // len(plan.grid)
    sides = scale_sides(
        plan, np.full(plan.channels, _FLOAT, np.float32) if plan.scheme == "int8" else None
    )
    layout = plan.layout
    present = [
        side.key for side in SIDE_TENSORS if side.presence(layout) == "always" or side.key in sides
    ]
    checksums = SideChecksums(**dict.fromkeys(present, _CHECKSUM))
    entropy = np.full(plan.planes, 8.0 * plan.source.entry.elements)
    tables_bytes = _TABLES_BYTES if layout.rans else None
    return coded_record(
        plan, number, chunks, entropy, sides, checksums, tables_bytes, [_FLOAT, 0.50012345], _DIGEST
    )
