"""Small tensors of one layout, checked and decoded together: as one matrix, one above the other.

Each call costs as much as the decoding of a small tensor. What `Container.tensor` and
`decode_run` do for each tensor is done here for many by the same number of calls. Nothing here
says what is wrong: where anything is, or may be, each tensor has to be read by itself.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from codecllm.formats.checksums import xxh3_hex_each
from codecllm.formats.codecs import CODEC_IDS
from codecllm.formats.codecs.rans_groups import join_group_tables
from codecllm.formats.errors import ChecksumError, FormatError, LayoutError
from codecllm.formats.files import Excerpt
from codecllm.formats.manifest.records import CodedTensor, Int8Tensor, StoredRecord
from codecllm.formats.schemes.int8 import check_steps
from codecllm.formats.shards.chunk_table import ChunkTable, join_chunk_tables
from codecllm.formats.shards.safetensors_header import ShardHeader
from codecllm.formats.shards.side_reading import widened_scales
from codecllm.formats.shards.side_tensors import CHUNKS, SCALE, SHAPE, TABLES, SideTensor
from codecllm.formats.stored_tensor import StoredTensor, tensor_matrix
from codecllm.formats.tiling import kept_grid


def layout_key(record: StoredRecord) -> Hashable | None:
    """Returns a key that tensors share which may be joined; None for one that may not.

    Joined are coded tensors of one tile, with scales by row or none, and no scales of columns.
    """
    if not isinstance(record, CodedTensor):
        return None
    key = (
        record.dtype,
        tuple(record.shape),
        tuple(record.tile),
        tuple([plane.codec for plane in record.planes]),
        record.xxh3.tables is None,
    )
    if not isinstance(record, Int8Tensor):
        return key
    if record.wide or record.channel_kind != "row" or record.xxh3.col_scale is not None:
        return None
    return (*key, record.channel_axis, record.scale_dtype)


def join_alike(
    records: list[CodedTensor], header: ShardHeader, excerpt: Excerpt
) -> tuple[StoredTensor, memoryview] | None:
    """Checks the side data of tensors of one `layout_key`.

    Args:
        records: the tensors, one or more.
        header: of their shard.
        excerpt: bytes of the shard that hold all of them, side tensors too.

    Returns:
        A tensor whose tile i is tensor i of the list, and the slots of its chunks, unchecked; its
        record is that of the first. None where `Container.tensor` may refuse one of them.
    """
    first = records[0]
    grid = kept_grid(*tensor_matrix(first), *first.tile)
    if len(grid) != 1:
        return None
    shape = np.array(first.shape, "<i8").tobytes()
    try:
        payloads = _parts(records, header, excerpt, "")
        parts = _checked_sides(records, header, excerpt, CHUNKS)
        table = join_chunk_tables(parts, grid, list(map(len, payloads)))
        _check_planes(records, table)
        if _checked_sides(records, header, excerpt, SHAPE) != [shape] * len(records):
            return None
        scales = None
        if isinstance(first, Int8Tensor):
            data = b"".join(_checked_sides(records, header, excerpt, SCALE))
            scales = widened_scales(data, first)
            check_steps(scales, None, wide=False)
        tables = None
        if first.xxh3.tables is not None:
            parts = _checked_sides(records, header, excerpt, TABLES)
            tables = join_group_tables(parts, table)
    except FormatError:
        return None
    joined = StoredTensor(first, excerpt, excerpt.begin, table, scales, tables)
    return joined, memoryview(b"".join(payloads))


def _parts(
    records: list[CodedTensor], header: ShardHeader, excerpt: Excerpt, suffix: str
) -> list[bytes]:
    """Returns the bytes of the payload of each tensor, or of one of its side tensors."""
    begin, data, entries = excerpt.begin, excerpt.data, header.tensors
    places = [entries[record.name + suffix] for record in records]
    return [data[place.start - begin : place.end - begin] for place in places]


def _checked_sides(
    records: list[CodedTensor], header: ShardHeader, excerpt: Excerpt, side: SideTensor
) -> list[bytes]:
    """Returns the bytes of one side tensor of each.

    Raises:
        ChecksumError: a checksum differs, of whichever.
    """
    parts = _parts(records, header, excerpt, side.suffix)
    if xxh3_hex_each(parts) != [side.checksum(record) for record in records]:
        raise ChecksumError("a side tensor differs from the manifest")
    return parts


def _check_planes(records: list[CodedTensor], table: ChunkTable) -> None:
    """Compares codecs and stored bytes with the manifest; each plane has one chunk.

    Raises:
        LayoutError: they differ, or the table has bits of a wide tensor.
    """
    codecs = [CODEC_IDS[plane.codec] for plane in records[0].planes]
    rows = table.records.reshape(len(records), -1)
    stored = [[plane.stored_bytes for plane in record.planes] for record in records]
    if (
        table.planes != len(codecs)
        or (rows["codec"] != np.array(codecs, np.uint8)).any()
        or rows["stored_bytes"].tolist() != stored
        or rows["low_bits"].any()
    ):
        raise LayoutError("chunk table and manifest disagree")
