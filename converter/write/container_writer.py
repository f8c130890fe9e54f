"""Writes the files of a container: shards in order, then side files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from codecllm.converter.encode.buffers import keep_freed_memory
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.side_files import (
    copy_side_files,
    pack_config,
    pack_index,
    write_listed,
)
from codecllm.converter.write.journal import Journal
from codecllm.converter.write.lanes import ShardJob, ShardLanes
from codecllm.converter.write.manifest import Conversion, build_manifest
from codecllm.formats.manifest.manifest import INDEX_NAME, Manifest, shard_name
from codecllm.formats.manifest.records import FileRecord, ShardRecord, StoredRecord
from codecllm.formats.shards.side_tensors import side_names

OnProgress = Callable[[str, int, int], None]
"""Called with a tensor's name, the source bytes done and the source bytes in all."""


def write_container(
    conversion: Conversion, folder: Path, journal: Journal, on_progress: OnProgress | None = None
) -> Manifest:
    """Encodes all tensors, writes shards and side files into `folder`; returns the manifest.

    Args:
        conversion: its decisions.
        folder: empty but for the finished shards of the journal.
        journal: shards that an earlier, killed conversion finished; the others are noted there.
        on_progress: called as bytes are done, in the calling thread.

    Raises:
        NonFiniteWeightError: an int8 tensor holds NaN or infinities, and `non_finite` is `error`.
        OSError, FormatError: reading or writing failed.
    """
    total = sum(plan.source.entry.bytes for plan in conversion.plan.tensors)
    done_bytes = 0

    def on_bytes(name: str, count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        if on_progress is not None:
            on_progress(name, done_bytes, total)

    keep_freed_memory()
    names = _names_of_shards(conversion)
    jobs = [
        ShardJob(number, name, plans)
        for number, (name, plans) in enumerate(names)
        if name not in journal.finished
    ]
    with ShardLanes(conversion, folder, journal, len(jobs)) as lanes:
        for name, plans in names:
            if name in journal.finished:
                on_bytes(name, sum(plan.source.entry.bytes for plan in plans))
        lanes.write(jobs, on_bytes)
        shards = [
            journal.finished.get(name) or lanes.finished[number].result()
            for number, (name, _) in enumerate(names)
        ]
    records = [record for shard in shards for record in shard.tensors]
    shard_records = [shard.record for shard in shards]
    files = _write_side_files(conversion, records, shard_records, folder)
    return build_manifest(conversion, records, shard_records, files)


def _names_of_shards(conversion: Conversion) -> list[tuple[str, list[TensorPlan]]]:
    shards = conversion.plan.shards
    return [(shard_name(number, len(shards)), plans) for number, plans in enumerate(shards, 1)]


def _write_side_files(
    conversion: Conversion, records: list[StoredRecord], shards: list[ShardRecord], folder: Path
) -> list[FileRecord]:
    model = conversion.model
    files = copy_side_files(model.repository, model.side_files, model.modules, folder)
    if model.config is not None:
        config = pack_config(
            model.config,
            conversion.options.scheme,
            conversion.plan.format_version,
            model.original_block,
        )
        files.append(write_listed(folder, "config.json", config))
    weight_map: dict[str, str] = {}
    for record in records:
        for name in (record.name, *side_names(record)):
            weight_map[name] = shards[record.shard].name
    parameters = sum(record.elements for record in records)
    stored_bytes = sum(shard.bytes for shard in shards)
    index = pack_index(weight_map, stored_bytes, parameters)
    files.append(write_listed(folder, INDEX_NAME, index))
    return sorted(files, key=lambda record: record.name)
