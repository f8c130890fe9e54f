"""Structure and checksums: the checks of a container that decode nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from codecllm.formats.container import Container
from codecllm.formats.errors import CodecLLMError, FormatError, SchemaError
from codecllm.formats.manifest.manifest import BASELINE_NAME
from codecllm.formats.manifest.records import AliasTensor, FileRecord
from codecllm.formats.manifest.unlisted import is_read_by_a_class, unlisted_error, unlisted_names
from codecllm.formats.shards.index import check_index
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.verifier.report import Stage

Progress = Callable[[str, int, int], None]
READ_BYTES = 4 << 20
"""Payload read at once: bounds the memory of a thread, whatever the tensor's size."""

_T = TypeVar("_T")
_R = TypeVar("_R")


def stored_names(container: Container) -> list[str]:
    """Returns the names of all tensors that have bytes of their own, in manifest order."""
    return [
        record.name for record in container.manifest.tensors if not isinstance(record, AliasTensor)
    ]


def check_structure(
    container: Container, stage: Stage, warnings: list[str], *, pinned: bool = False
) -> None:
    """Checks listed files, shards, side tensors and chunk tables, without reading payloads.

    Every listed file must be there and have its size.

    Args:
        container: the container.
        stage: receives findings and figures.
        warnings: receives a line for each unlisted file that is no fault.
        pinned: whether the caller named the manifest's sha256. Then an unlisted file that a class
            of transformers might read is a fault.
    """
    manifest = container.manifest
    for record in manifest.files:
        with collected(stage):
            container.check_presence(record)
    broken = set()
    for number in range(len(manifest.shards)):
        try:
            container.shard(number)
        except CodecLLMError as exc:
            stage.fail(exc)
            broken.add(number)
    for name in stored_names(container):
        # Tensors of a shard that does not open would repeat its fault, once for each of them.
        if container.records[name].shard not in broken:  # type: ignore[union-attr]
            with collected(stage):
                container.tensor(name)
    with collected(stage):
        check_index(container)
    _check_unlisted(container, stage, warnings, pinned)
    tensors = len(manifest.tensors)
    stage.summary = (
        f"{len(manifest.shards)} shards, {len(manifest.files)} side files, {tensors} tensors"
    )
    stage.facts = {"shards": len(manifest.shards), "files": len(manifest.files), "tensors": tensors}


def check_checksums(
    container: Container, stage: Stage, workers: int, progress: Progress | None
) -> None:
    """Checks the sha256 of every listed file and the xxh3-64 of every chunk and plain tensor."""
    manifest = container.manifest
    records: list[FileRecord] = [*manifest.files, *manifest.shards]
    # Shards are read twice: the sha256 says that the file is not the one that was published, the
    # checksums of the chunks say where it is damaged.
    total = sum(record.bytes for record in records) + sum(
        record.bytes for record in manifest.shards
    )
    bytes_done = chunks = 0
    with ThreadPoolExecutor(workers) as pool:
        for record, fault in in_order(pool, records, lambda record: _file_fault(container, record)):
            bytes_done += record.bytes
            _tell(progress, record.name, bytes_done, total)
            if fault is not None:
                stage.fail(fault)
        for name, (count, size, faults) in in_order(
            pool, stored_names(container), lambda name: _chunk_faults(container, name)
        ):
            bytes_done, chunks = bytes_done + size, chunks + count
            _tell(progress, name, min(bytes_done, total), total)
            for error in faults:
                stage.fail(error)
    stage.summary = (
        f"sha256 of {len(records)} files, xxh3-64 of {chunks:,} chunks and plain tensors"
    )
    stage.facts = {"files": len(records), "chunks": chunks, "damaged": len(stage.findings)}


@contextmanager
def collected(stage: Stage) -> Iterator[None]:
    """Turns a CodecLLMError of its block into a finding of the stage."""
    try:
        yield
    except CodecLLMError as exc:
        stage.fail(exc)


def in_order(
    pool: ThreadPoolExecutor, items: Iterable[_T], job: Callable[[_T], _R]
) -> Iterator[tuple[_T, _R]]:
    """Runs `job` on every item in the pool; yields items and results in the items' order."""
    item_list = list(items)
    yield from zip(item_list, pool.map(job, item_list), strict=True)


def runs_of_chunks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Cuts a tensor's chunks into runs [first, last) of about `READ_BYTES` of payload."""
    offsets, count, first = tensor.table.offsets, len(tensor.table.records), 0
    while first < count:
        last = first + 1
        while last < count and int(offsets[last + 1] - offsets[first]) <= READ_BYTES:
            last += 1
        yield first, last
        first = last


def _file_fault(container: Container, record: FileRecord) -> CodecLLMError | None:
    try:
        container.check_file(record)
    except CodecLLMError as exc:
        return exc
    return None


def _chunk_faults(container: Container, name: str) -> tuple[int, int, list[CodecLLMError]]:
    """Returns the number of chunks of a tensor, their bytes, and one error per damaged one."""
    try:
        tensor = container.tensor(name)
        if isinstance(tensor, PlainTensor):
            tensor.read()
            return 1, tensor.record.source_bytes, []
    except CodecLLMError as exc:
        return 0, 0, [exc]
    faults: list[CodecLLMError] = []
    count, buffer = len(tensor.table.records), bytearray()
    for first, last in runs_of_chunks(tensor):
        size = tensor.slots_bytes(first, last)
        if len(buffer) < size:
            buffer = bytearray(size)
        try:
            slots = tensor.read_slots(first, last, buffer)
        except CodecLLMError as exc:
            return count, 0, [*faults, exc]
        for chunk in range(first, last):
            try:
                tensor.stored_chunk(chunk, slots, first)
            except FormatError as exc:
                faults.append(exc)
    return count, int(tensor.table.offsets[-1]), faults


def _check_unlisted(container: Container, stage: Stage, warnings: list[str], pinned: bool) -> None:
    for name in unlisted_names(container.folder, container.manifest):
        # Loaders that look for *.safetensors would read it, so it is a fault and no remark.
        if name.endswith(".safetensors"):
            stage.fail(SchemaError("shard is not listed in the manifest", file=name))
        elif pinned and is_read_by_a_class(container.folder, name):
            stage.fail(unlisted_error(name))
        elif name == BASELINE_NAME:
            warnings.append(f"{name} is not listed in the manifest: ignored")
        else:
            warnings.append(f"{name} is not listed in the manifest: not checked")


def _tell(progress: Progress | None, name: str, done: int, total: int) -> None:
    if progress is not None:
        progress(name, done, total)
