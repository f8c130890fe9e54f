"""Compares a manifest with its shards and tensors, without reading payloads."""

from __future__ import annotations

import math
import os

import numpy as np

from codecllm.formats import limits
from codecllm.formats.checksums import check_xxh3
from codecllm.formats.codecs import CODEC_IDS, CODEC_NAMES
from codecllm.formats.errors import (
    LayoutError,
    LimitError,
    TruncatedError,
    UsageError,
)
from codecllm.formats.files import SafeFile, refuse_foreign
from codecllm.formats.manifest.manifest import MANIFEST_NAME, Manifest
from codecllm.formats.manifest.records import (
    CodedTensor,
    FileRecord,
    RawTensor,
)
from codecllm.formats.shards.chunk_table import FEW_CHUNKS, HEADER, RECORD, ChunkTable
from codecllm.formats.shards.safetensors_header import ShardHeader, TensorEntry
from codecllm.formats.shards.side_tensors import CHUNKS, side_names, side_types
from codecllm.formats.stored_tensor import tensor_matrix
from codecllm.formats.tiling import kept_grid

MAX_EXPANSION = "CODECLLM_MAX_EXPANSION"
"""The variable of the environment that lifts the bound on declared size against stored size."""


def check_shard_header(manifest: Manifest, number: int, header: ShardHeader) -> None:
    """Checks that a shard's header has its checksum and exactly the tensors of the manifest.

    Raises:
        ChecksumError: the header differs from the manifest.
        LayoutError: a tensor is missing, too many, or of another type.
    """
    file = manifest.shards[number].name
    check_xxh3(header.raw, manifest.shards[number].header_xxh3, file, None, 0)
    stored = header.tensors
    count = 0
    for record in manifest.stored_in[number]:
        if isinstance(record, RawTensor):
            _check_entry(stored, record.name, record.dtype, tuple(record.shape), file)
            count += 1
            continue
        # Its length follows from the chunks, which are not read yet.
        _check_entry(stored, record.name, "U8", None, file)
        types = side_types(record)
        for suffix, dtype, shape in types:
            _check_entry(stored, record.name + suffix, dtype, shape, file)
        count += 1 + len(types)
    # No name stands twice in a manifest, so a header with more entries has others.
    if count != len(stored):
        expected_names = {
            name
            for record in manifest.stored_in[number]
            for name in (record.name, *side_names(record))
        }
        extra = next(name for name in stored if name not in expected_names)
        raise LayoutError(
            "shard holds a tensor that the manifest does not place there",
            file=file,
            tensor=extra,
        )


def _check_entry(
    stored: dict[str, TensorEntry],
    name: str,
    dtype: str,
    shape: tuple[int, ...] | None,
    file: str,
) -> None:
    """Compares the type of a stored tensor with the manifest; a shape of None is of rank 1."""
    entry = stored.get(name)
    if entry is None:
        raise LayoutError(
            "shard lacks a tensor that the manifest places there", file=file, tensor=name
        )
    if entry.dtype.name != dtype or (
        entry.shape != shape if shape is not None else len(entry.shape) != 1
    ):
        raise LayoutError(
            "stored type differs from the manifest",
            file=file,
            tensor=name,
            got=f"{entry.dtype.name} {list(entry.shape)}",
            expected=dtype,
        )


def expansion_bound() -> float:
    """Returns how many times their stored size tensors may have, by the environment or by default.

    Raises:
        UsageError: `CODECLLM_MAX_EXPANSION` is not a finite number from 0.
    """
    text = os.environ.get(MAX_EXPANSION, str(limits.EXPANSION))
    try:
        most = float(text)
    except ValueError:
        most = math.nan
    # Every comparison with NaN is false, and none reaches infinity: the bound would be lifted.
    if not 0 <= most < math.inf:
        raise UsageError(
            f"{MAX_EXPANSION} is not a number", got=ascii(text)[:40], expected="a finite one from 0"
        )
    return most


def check_expansion(manifest: Manifest, most: float | None = None) -> None:
    """Refuses tensors that are far larger than their stored bytes.

    A small file would cost hours.

    Args:
        manifest: of the container.
        most: how many times their stored size the tensors may have; None as for `Container`.

    Raises:
        LimitError: they are larger, and together larger than 256 MiB.
        UsageError: as `expansion_bound`.
    """
    if most is None:
        most = expansion_bound()
    declared_bytes = sum(record.source_bytes for shard in manifest.stored_in for record in shard)
    stored_bytes = sum(shard.bytes for shard in manifest.shards)
    if declared_bytes > max(limits.EXPANSION_FREE_BYTES, most * stored_bytes):
        raise LimitError(
            f"tensors are too large for what is stored of them ({MAX_EXPANSION}=N allows N times)",
            file=MANIFEST_NAME,
            got=f"{declared_bytes} bytes from {stored_bytes}",
            expected=f"at most {most:g} times",
        )


def check_geometry(record: CodedTensor, table: ChunkTable, file: str) -> None:
    """Compares a chunk table with its record.

    Raises:
        LayoutError: tiles, planes, codecs or stored bytes differ.
    """
    rows, cols = tensor_matrix(record)
    expected = kept_grid(rows, cols, record.tile[0], record.tile[1])
    if table.grid != expected or table.planes != len(record.planes):
        raise LayoutError(
            "chunk table and manifest disagree",
            file=file,
            tensor=record.name,
            got=str(table.grid),
            expected=str(expected),
        )
    if _few_chunks_fit(record, table):
        return
    _check_codecs(record, table, file)
    stored_bytes = np.add.reduce(
        # int64: sums of 32-bit sizes pass 4 GiB.
        table.records["stored_bytes"].reshape(-1, table.planes),
        axis=0,
        dtype=np.int64,
    ).tolist()
    if stored_bytes != [plane.stored_bytes for plane in record.planes]:
        raise LayoutError(
            "chunk table and manifest disagree on stored bytes",
            file=file,
            tensor=record.name,
            got=stored_bytes,
        )


def _few_chunks_fit(record: CodedTensor, table: ChunkTable) -> bool:
    """Whether codecs and stored bytes are certainly those of the record; of short tables alone."""
    if len(table.records) > FEW_CHUNKS:
        return False
    for number, plane in enumerate(record.planes):
        chunks = table.chunks[number :: table.planes]
        codec = CODEC_IDS[plane.codec]
        codecs = {chunk.codec for chunk in chunks}
        if (
            codec not in codecs
            or not codecs <= {codec, CODEC_IDS["raw"]}
            or sum(chunk.stored_bytes for chunk in chunks) != plane.stored_bytes
        ):
            return False
    return True


def check_table_size(header: ShardHeader, record: CodedTensor, file: str) -> None:
    """Refuses a chunk table that is too long for its payload before it is read.

    Each chunk has a slot of 16 bytes or more in the payload, and 16 bytes in the table.
    """
    payload = header.tensors[record.name].bytes
    table = header.tensors[CHUNKS.name_for(record.name)].bytes
    if table > HEADER.itemsize + payload // limits.SLOT_ALIGNMENT * RECORD.itemsize:
        raise LayoutError(
            "chunk table is too long for its payload",
            file=file,
            tensor=record.name,
            got=f"{table} bytes",
            expected=f"for a payload of {payload} bytes",
        )


def _check_codecs(record: CodedTensor, table: ChunkTable, file: str) -> None:
    """Refuses a plane whose chunks use another codec than `raw` and the plane's.

    At least one chunk must use the plane's codec.
    """
    codecs = table.records["codec"].reshape(-1, table.planes)
    plane_codecs = np.array([CODEC_IDS[plane.codec] for plane in record.planes], np.uint8)
    wrong = (codecs != plane_codecs) & (codecs != CODEC_IDS["raw"])
    if np.count_nonzero(wrong):
        chunk = int(wrong.reshape(-1).argmax())
        name = CODEC_NAMES[int(codecs.reshape(-1)[chunk])]
        raise LayoutError(
            f"chunk uses codec {name!r}, its plane does not",
            file=file,
            tensor=record.name,
            chunk=chunk,
        )
    # Readers choose decoders by the record, so it names a codec only if a chunk uses it.
    unused_planes = (codecs != plane_codecs).all(axis=0)
    if np.count_nonzero(unused_planes):
        plane = int(unused_planes.argmax())
        raise LayoutError(
            f"no chunk of plane {plane} uses its codec {record.planes[plane].codec!r}",
            file=file,
            tensor=record.name,
        )


def check_size(file: SafeFile, record: FileRecord) -> None:
    """Compares the size of a file with its record.

    Raises:
        NotAContainerError: its first bytes are those of something else, such as a Git LFS pointer.
        TruncatedError: the file is shorter.
        LayoutError: it is longer.
    """
    # A file of another size is often a pointer or an error page, which has its own message.
    if file.size != record.bytes:
        refuse_foreign(file)
    if file.size < record.bytes:
        raise TruncatedError(
            "file is too short", file=record.name, got=file.size, expected=f"{record.bytes} bytes"
        )
    if file.size > record.bytes:
        raise LayoutError(
            "file is too long", file=record.name, got=file.size, expected=f"{record.bytes} bytes"
        )
