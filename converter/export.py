"""Container -> plain safetensors model, the way back: bit-identical for `lossless`, dequantized for `int8`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from codecllm.converter.conversion import DEFAULT_MAX_SHARD_BYTES, ConvertOptions
from codecllm.converter.side_files import pack_index, write_listed
from codecllm.converter.staging import Staging
from codecllm.converter.tensor_writer import ordered
from codecllm.formats.container import Container, PlainTensor, StoredTensor
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import ChecksumError
from codecllm.formats.manifest import BASELINE_NAME, INDEX_NAME, Int8Tensor, TensorRecord, shard_name
from codecllm.formats.reference import read_tensor_bytes, read_tiles_bytes, tiles_at_once
from codecllm.formats.shard_writer import PlannedTensor, ShardWriter


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote: the folder, its weight files, and the bytes of all tensors."""

    out: Path
    shards: list[str]
    tensor_bytes: int


def export(
    container: str | Path,
    out: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExportReport:
    """Writes the plain model of a container.

    Args:
        container: the container's folder.
        out: folder to make; absent or empty.
        max_shard_bytes: no weight file is longer, unless one tensor is.
        workers: decoding threads; None takes one per core, or more where the codec gains by it.
        progress: called with a tensor's name, bytes done and bytes in all.

    Raises:
        FormatError: something in the container is damaged. Nothing stays in `out`.
        OutputExistsError: `out` is not empty.
        OSError: writing failed.
    """
    ConvertOptions(workers=workers, max_shard_bytes=max_shard_bytes).threads()  # refuses what cannot be
    with Container(container) as opened, Staging(out, force=False) as staging:
        placed = _place(opened.manifest.tensors, max_shard_bytes)
        names = ["model.safetensors"] if len(placed) == 1 else [shard_name(n + 1, len(placed)) for n in range(len(placed))]
        done, total = 0, sum(record.source_bytes for record in opened.manifest.tensors)
        threads = opened.decoding_threads(workers)
        with ThreadPoolExecutor(threads, thread_name_prefix="codecllm-export") as executor:
            for name, records in zip(names, placed, strict=True):
                for tensor, count in _write_shard(executor, 2 * threads, opened, staging.folder / name, records):
                    done += count
                    if progress is not None:
                        progress(tensor, done, total)
        if len(placed) > 1:
            _write_index(staging.folder, names, placed, total)
        _write_side_files(opened, staging.folder)
        staging.commit_plain(last="config.json")
    return ExportReport(Path(out), names, total)


def _place(records: list[TensorRecord], max_shard_bytes: int) -> list[list[TensorRecord]]:
    shards: list[list[TensorRecord]] = [[]]
    filled = 0
    for record in records:
        size = record.source_bytes + 512
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(record)
        filled += size
    return shards


def _write_shard(
    executor: ThreadPoolExecutor, window: int, container: Container, path: Path, records: list[TensorRecord]
) -> Iterator[tuple[str, int]]:
    planned = [PlannedTensor(r.name, DTYPES[r.dtype], tuple(r.shape), r.source_bytes) for r in records]
    shard = ShardWriter(path, planned, {"format": "pt"})
    try:
        for record in records:
            digest = hashlib.sha256()
            for part in _parts(executor, window, container, record.name):
                digest.update(part)
                shard.write(part)
                yield record.name, len(part)
            shard.end_tensor(record.name, record.dtype, tuple(record.shape))
            _check_digest(container, record.name, digest.hexdigest())
        shard.finish()
    except BaseException:
        shard.abort()
        raise


def _parts(executor: ThreadPoolExecutor, window: int, container: Container, name: str) -> Iterator[bytes]:
    """Yields a tensor's bytes in order; by runs of tiles where tiles follow the source's order, else at once."""
    tensor = container.tensor(name)
    if isinstance(tensor, PlainTensor) or not tensor.table.grid.in_source_order:
        yield read_tensor_bytes(container, name)
        return
    stored: StoredTensor = tensor
    count, step = len(stored.table.grid), tiles_at_once(stored)
    runs = (range(first, min(first + step, count)) for first in range(0, count, step))
    yield from ordered(executor, lambda tiles: read_tiles_bytes(stored, tiles), runs, window)


def _check_digest(container: Container, name: str, got: str) -> None:
    """Compares with the manifest where the digest covers the source's own bytes."""
    record = container.tensor(name).record
    if not isinstance(record, Int8Tensor) and got != record.digest:
        raise ChecksumError("decoded tensor differs from its digest", tensor=name, got=got, expected=record.digest)


def _write_index(folder: Path, names: list[str], placed: list[list[TensorRecord]], total: int) -> None:
    weight_map = {record.name: name for name, records in zip(names, placed, strict=True) for record in records}
    parameters = sum(record.elements for records in placed for record in records)
    write_listed(folder, INDEX_NAME, pack_index(weight_map, total, parameters))


def _write_side_files(container: Container, folder: Path) -> None:
    for record in container.manifest.files:
        if record.name in (INDEX_NAME, BASELINE_NAME):
            continue
        data = container.read_side_file(record)
        if record.name == "config.json":
            config = json.loads(data)
            config.pop("quantization_config", None)
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        write_listed(folder, record.name, data)
