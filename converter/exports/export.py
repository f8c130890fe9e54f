"""Container -> a model in another layout.

Plain safetensors (bit-identical for `lossless`, else dequantized), or packed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.exports.compressed_tensors import (
    PACKED,
    PACKED_SCALE,
    PACKED_SHAPE,
    PLAIN,
    PackedLayout,
)
from codecllm.converter.exports.packed_words import pack_codes, packed_columns
from codecllm.converter.options import DEFAULT_MAX_SHARD_BYTES, ConvertOptions
from codecllm.converter.source.layout import ADAPTER_NAMES
from codecllm.converter.source.quantization import find_quantization
from codecllm.converter.source.side_files import pack_index, write_listed
from codecllm.converter.write.staging import Staging
from codecllm.converter.write.tensor_writer import ordered
from codecllm.formats.arguments.check import check_arguments, instance, optional
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import ChecksumError, LayoutError, SchemaError, shown
from codecllm.formats.manifest.manifest import (
    BASELINE_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    LOAD_REPORT_NAME,
    ORIGINAL_KEY,
    shard_name,
)
from codecllm.formats.manifest.records import Int8Tensor, TensorRecord
from codecllm.formats.reference import read_codes, read_run_bytes, read_run_codes, runs
from codecllm.formats.shards.safetensors_header import TensorEntry
from codecllm.formats.shards.shard_writer import PlannedTensor, ShardWriter
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.formats.strict_json import parse_config


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The result of an export.

    Attributes:
        out: the folder.
        shards: its weight files.
        tensor_bytes: bytes of all tensors.
        notes: sentences for the user.
    """

    out: Path
    shards: list[str]
    tensor_bytes: int
    notes: tuple[str, ...] = ()


def export(
    container: str | Path,
    out: str | Path,
    *,
    layout: PackedLayout | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ExportReport:
    """Writes the model of a container for others to read.

    Args:
        container: the container's folder.
        out: folder to make; absent or empty.
        layout: tensors to write as packed codes (`compressed_tensors.plan_layout`); None writes all
            of them plainly.
        max_shard_bytes: no weight file is longer, unless one tensor is.
        workers: decoding threads; None takes one per core, or more where the codec gains by it.
        progress: called with a tensor's name, bytes done and bytes in all.

    Raises:
        FormatError: something in the container is damaged: nothing stays in `out`. Or its
            config.json is no JSON object, or a side file needs the name of a weight file, or is an
            adapter or other weights.
        OutputExistsError: `out` is not empty.
        OSError: writing failed.
    """
    options = ConvertOptions(workers=workers, max_shard_bytes=max_shard_bytes)
    check_arguments(progress=progress)
    optional(instance(PackedLayout))(layout, "layout")
    with Container(container) as source_container, Staging(out, force=False) as staging:
        layout = layout or PLAIN
        config = _read_config(source_container)
        _refuse_stale_block(source_container, config or {})
        records_by_shard = _place(source_container.manifest.tensors, options.max_shard_bytes)
        names = (
            ["model.safetensors"]
            if len(records_by_shard) == 1
            else [shard_name(n + 1, len(records_by_shard)) for n in range(len(records_by_shard))]
        )
        _refuse_clashes(source_container, {*names, INDEX_NAME})
        sizes = {
            record.name: _written_bytes(record, layout)
            for record in source_container.manifest.tensors
        }
        done_bytes, total = 0, sum(sizes.values())
        threads = options.threads
        with ThreadPoolExecutor(threads, thread_name_prefix="codecllm-export") as executor:
            for name, records in zip(names, records_by_shard, strict=True):
                for tensor, count in _write_shard(
                    executor,
                    2 * threads,
                    source_container,
                    staging.folder / name,
                    records,
                    layout,
                ):
                    done_bytes += count
                    if progress is not None:
                        progress(tensor, done_bytes, total)
        if len(records_by_shard) > 1:
            _write_index(staging.folder, names, records_by_shard, total, layout)
        _write_side_files(source_container, staging.folder, config, layout)
        # Without config.json a folder is no model: a kill leaves no half of one.
        staging.commit_plain(last=CONFIG_NAME)
    return ExportReport(staging.out, names, total, layout.notes)


def _read_config(container: Container) -> dict[str, Any] | None:
    """Returns the JSON object of config.json; before weights are written, as it may be damaged."""
    record = container.manifest.file(CONFIG_NAME)
    return None if record is None else parse_config(container.read_side_file(record))


def _refuse_clashes(container: Container, written: set[str]) -> None:
    """Refuses side files in the place of the exported model's, or that would change it."""
    for record in container.manifest.files:
        if record.name.split("/")[0] in written and "/" in record.name:
            raise SchemaError(
                "the folder of this file has the name of a file of the exported model",
                file=record.name,
            )
        if record.name in ADAPTER_NAMES:
            raise LayoutError(
                "a container has no adapter, and transformers would change the model by it",
                file=record.name,
            )
        if record.name.endswith(".safetensors") and "/" not in record.name:
            raise LayoutError(
                "weights beside those of the container: transformers may read them instead",
                file=record.name,
            )


def _refuse_stale_block(container: Container, config: dict[str, Any]) -> None:
    """Refuses a quantization block that no tensor bears out: its weights would be at random."""
    block = config.get("quantization_config")
    if not isinstance(block, dict) or ORIGINAL_KEY not in block:
        return
    original = block[ORIGINAL_KEY]
    entries = {
        record.name: TensorEntry(
            record.name, DTYPES[record.dtype], tuple(record.shape), 0, record.source_bytes
        )
        for record in container.records.values()
    }
    if not find_quantization(config | {"quantization_config": original}, entries).borne_out:
        raise LayoutError(
            "config.json keeps a quantization block, and no tensor is quantized so",
            file=CONFIG_NAME,
            got=shown(original)[:80],
        )


def _place(records: list[TensorRecord], max_shard_bytes: int) -> list[list[TensorRecord]]:
    shards: list[list[TensorRecord]] = [[]]
    shard_bytes = 0
    for record in records:
        # 512 bytes for the tensor's entry in the header, as in a conversion.
        size = record.source_bytes + 512
        if shards[-1] and shard_bytes + size > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(record)
        shard_bytes += size
    return shards


def _written_bytes(record: TensorRecord, layout: PackedLayout) -> int:
    return sum(tensor.max_bytes for tensor in _planned(record, layout))


def _planned(record: TensorRecord, layout: PackedLayout) -> list[PlannedTensor]:
    """Returns the tensors that are written for one of the container, with their exact sizes."""
    if record.name not in layout.packed:
        return [
            PlannedTensor(
                record.name, DTYPES[record.dtype], tuple(record.shape), record.source_bytes
            )
        ]
    rows, words = record.shape[0], packed_columns(record.shape[1], layout.width)
    module = record.name.removesuffix("weight")
    return [
        PlannedTensor(module + PACKED, DTYPES["I32"], (rows, words), 4 * rows * words),
        PlannedTensor(module + PACKED_SCALE, DTYPES["F32"], (rows, 1), 4 * rows),
        PlannedTensor(module + PACKED_SHAPE, DTYPES["I64"], (2,), 16),
    ]


def _write_shard(
    executor: ThreadPoolExecutor,
    window: int,
    container: Container,
    path: Path,
    records: list[TensorRecord],
    layout: PackedLayout,
) -> Iterator[tuple[str, int]]:
    """Writes a shard; yields the name of each tensor with the bytes that were written for it."""
    shard = ShardWriter(
        path,
        [tensor for record in records for tensor in _planned(record, layout)],
        {"format": "pt"},
    )
    try:
        for record in records:
            write = _write_packed if record.name in layout.packed else _write_plain
            for size in write(executor, window, container, shard, record, layout):
                yield record.name, size
        shard.finish()
    except BaseException:
        shard.abort()
        raise


def _write_plain(
    executor: ThreadPoolExecutor,
    window: int,
    container: Container,
    shard: ShardWriter,
    record: TensorRecord,
    layout: PackedLayout,
) -> Iterator[int]:
    del layout
    digest = hashlib.sha256()
    for part in _parts(executor, window, container, record.name):
        digest.update(part)
        shard.write(part)
        yield len(part)
    shard.end_tensor(record.name, record.dtype, tuple(record.shape))
    _check_digest(container, record.name, digest.hexdigest())


def _write_packed(
    executor: ThreadPoolExecutor,
    window: int,
    container: Container,
    shard: ShardWriter,
    record: TensorRecord,
    layout: PackedLayout,
) -> Iterator[int]:
    """Writes codes as packed words, then scales and shape.

    The codes are compared with the tensor's digest.
    """
    tensor = container.tensor(record.name)
    assert isinstance(tensor, StoredTensor) and tensor.scales is not None
    digest = hashlib.sha256()
    for codes in _codes(executor, window, tensor):
        # The digest covers codes, not words: they are hashed before they are packed.
        digest.update(codes.tobytes())
        words = pack_codes(codes, layout.width)
        shard.write(words)
        yield words.nbytes
    codes_entry, scale, shape = _planned(record, layout)
    shard.end_tensor(codes_entry.name, "I32", codes_entry.max_shape)
    scales = tensor.scales.astype("<f4").tobytes()
    digest.update(scales)
    # Before the commit: a tensor that differs never leaves staging.
    _compare_digest(record.name, digest.hexdigest(), tensor.record.digest)
    yield shard.add(scale.name, "F32", scale.max_shape, scales)
    yield shard.add(shape.name, "I64", shape.max_shape, np.array(record.shape, "<i8").tobytes())


def _codes(
    executor: ThreadPoolExecutor, window: int, tensor: StoredTensor
) -> Iterator[NDArray[np.signedinteger]]:
    """Yields whole rows of a tensor's codes in order; at once where its rows are cut into tiles."""
    grid = tensor.table.grid
    # A run of such tiles need not end where a row ends, and words are packed by rows.
    if grid.tile_cols < grid.cols and tensor.tiles_together == 1:
        yield read_codes(tensor)
        return
    yield from ordered(
        executor, lambda tiles: np.concatenate(read_run_codes(tensor, tiles)), runs(tensor), window
    )


def _parts(
    executor: ThreadPoolExecutor, window: int, container: Container, name: str
) -> Iterator[bytes]:
    """Yields a tensor's bytes in order, by runs of tiles."""
    tensor = container.tensor(name)
    if isinstance(tensor, PlainTensor):
        yield bytes(tensor.read())
        return
    coded_tensor: StoredTensor = tensor
    yield from ordered(
        executor, lambda tiles: read_run_bytes(coded_tensor, tiles), runs(coded_tensor), window
    )


def _check_digest(container: Container, name: str, got: str) -> None:
    """Compares with the manifest where the digest covers the source's own bytes."""
    record = container.tensor(name).record
    # The digest of int8 covers codes and scales, which dequantized weights no longer show.
    if not isinstance(record, Int8Tensor):
        _compare_digest(name, got, record.digest)


def _compare_digest(name: str, got: str, expected: str) -> None:
    if got != expected:
        raise ChecksumError(
            "decoded tensor differs from its digest", tensor=name, got=got, expected=expected
        )


def _write_index(
    folder: Path,
    names: list[str],
    placed: list[list[TensorRecord]],
    total: int,
    layout: PackedLayout,
) -> None:
    weight_map = {
        tensor.name: name
        for name, records in zip(names, placed, strict=True)
        for record in records
        for tensor in _planned(record, layout)
    }
    parameters = sum(record.elements for records in placed for record in records)
    write_listed(folder, INDEX_NAME, pack_index(weight_map, total, parameters))


def _write_side_files(
    container: Container, folder: Path, config: dict[str, Any] | None, layout: PackedLayout
) -> None:
    for record in container.manifest.files:
        # The index is written anew; baseline and load report belong to the container.
        if record.name in (INDEX_NAME, BASELINE_NAME, LOAD_REPORT_NAME):
            continue
        data = container.read_side_file(record)
        if record.name == CONFIG_NAME and config is not None:
            # Our block would send loaders to codecllm; the block of the source's own quantization
            # returns.
            block = config.pop("quantization_config", None)
            config.pop("transformers_weights", None)  # the exported files have their own names
            if isinstance(block, dict) and ORIGINAL_KEY in block:
                config["quantization_config"] = block[ORIGINAL_KEY]
            if layout.packed:
                config["quantization_config"] = layout.quantization_config
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        write_listed(folder, record.name, data)
