"""Writes the files of a container: shards in order, then side files."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from codecllm.converter.encode.buffers import keep_freed_memory
from codecllm.converter.plan.conversion_plan import planned_entries
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.side_files import (
    copy_side_files,
    pack_config,
    pack_index,
    write_listed,
)
from codecllm.converter.write.backlog import Backlog
from codecllm.converter.write.journal import FinishedShard, Journal
from codecllm.converter.write.manifest import Conversion, build_manifest
from codecllm.converter.write.tensor_writer import StoredRecord, TensorWriter
from codecllm.formats.checksums import sha256_of_descriptor, xxh3_hex
from codecllm.formats.files import SafeFile
from codecllm.formats.manifest.manifest import INDEX_NAME, Manifest, shard_name
from codecllm.formats.manifest.records import FileRecord, ShardRecord
from codecllm.formats.shards.shard_writer import ShardWriter
from codecllm.formats.shards.side_tensors import side_names

_BACKLOG_BYTES = 12 << 20  # that are being hashed or written, for each worker

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

    threads = conversion.options.threads
    keep_freed_memory()
    with _Threads(threads) as pools:
        writer = TensorWriter(
            pools.workers,
            [
                plan
                for name, plans in _names_of_shards(conversion)
                if name not in journal.finished
                for plan in plans
            ],
            window=2 * threads + 2,
            backlog=Backlog(threads * _BACKLOG_BYTES),
            non_finite=conversion.options.non_finite,
            on_bytes=on_bytes,
            params=conversion.choice.provider,
        )
        for name, plans in _names_of_shards(conversion):
            if name in journal.finished:
                on_bytes(name, sum(plan.source.entry.bytes for plan in plans))
        records, shards = _write_shards(conversion, writer, pools, folder, journal)
    files = _write_side_files(conversion, records, shards, folder)
    return build_manifest(conversion, records, shards, files)


class _Threads:
    """Threads of a conversion: many encode and hash, one writes, two wait for the disk."""

    def __init__(self, workers: int) -> None:
        self.workers = ThreadPoolExecutor(workers, thread_name_prefix="codecllm-encode")
        self.write = ThreadPoolExecutor(1, thread_name_prefix="codecllm-write")
        # fsync may take seconds: no worker has to wait for the disk.
        self.sync = ThreadPoolExecutor(1, thread_name_prefix="codecllm-sync")
        self.journal = ThreadPoolExecutor(1, thread_name_prefix="codecllm-journal")
        self.opened: list[ShardWriter] = []

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *exc: object) -> None:
        for pool in (self.write, self.sync, self.workers, self.journal):
            pool.shutdown(wait=True, cancel_futures=True)
        # All threads have ended: none can write into a closed descriptor.
        for shard in self.opened:
            shard.abort()  # of no effect where it is finished


def shard_metadata(version: str) -> dict[str, str]:
    """Returns the strings that the header of a shard holds."""
    return {"format": "pt", "codecllm.format_version": version}


def _names_of_shards(conversion: Conversion) -> list[tuple[str, list[TensorPlan]]]:
    shards = conversion.plan.shards
    return [(shard_name(number, len(shards)), plans) for number, plans in enumerate(shards, 1)]


def _write_shards(
    conversion: Conversion, writer: TensorWriter, pools: _Threads, folder: Path, journal: Journal
) -> tuple[list[StoredRecord], list[ShardRecord]]:
    """Writes the shards; earlier ones are hashed and synchronized meanwhile."""
    finished_shards: list[Future[FinishedShard]] = []
    metadata = shard_metadata(conversion.plan.format_version)
    for number, (name, plans) in enumerate(_names_of_shards(conversion)):
        earlier = journal.finished.get(name)
        if earlier is not None:
            known_shard: Future[FinishedShard] = Future()
            known_shard.set_result(earlier)
            finished_shards.append(known_shard)
            continue
        shard = ShardWriter(folder / name, planned_entries(plans), metadata, pools.write)
        pools.opened.append(shard)
        records = list(writer.write_all(plans, shard, number))
        record = pools.workers.submit(_finish_shard, shard, pools.sync)
        finished_shards.append(pools.journal.submit(_note, journal, record, records))
    shards = [future.result() for future in finished_shards]
    return [record for shard in shards for record in shard.tensors], [
        shard.record for shard in shards
    ]


def _note(
    journal: Journal, record: Future[ShardRecord], tensors: list[Future[StoredRecord]]
) -> FinishedShard:
    """Notes in the journal that a shard is whole and on the disk."""
    shard = FinishedShard(record.result(), [tensor.result() for tensor in tensors])
    journal.add(shard)
    return shard


def _finish_shard(shard: ShardWriter, sync: ThreadPoolExecutor) -> ShardRecord:
    head, size = shard.complete()
    # The disk works while the file is hashed from the page cache.
    sync_result = sync.submit(shard.sync)
    with SafeFile(shard.path.parent, shard.path.name) as file:
        digest = sha256_of_descriptor(file.descriptor)[0]
    sync_result.result()
    return ShardRecord(name=shard.path.name, bytes=size, sha256=digest, header_xxh3=xxh3_hex(head))


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
