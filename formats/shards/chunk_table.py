"""The chunk table `X_chunks`: how each tile and plane of a tensor is stored (SPEC.md 5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from codecllm.formats import limits
from codecllm.formats.codecs import CODEC_NAMES
from codecllm.formats.errors import (
    LayoutError,
    LimitError,
    SchemaError,
    UnsupportedVersionError,
)
from codecllm.formats.tiling import Grid, kept_grid

MAGIC = b"CLCT"
TABLE_VERSION = 1

HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("planes", "u1"),
        ("reserved", "<u2"),
        ("rows", "<u8"),
        ("cols", "<u8"),
        ("tile_rows", "<u4"),
        ("tile_cols", "<u4"),
    ]
)
_KNOWN_CODECS = np.isin(np.arange(256), list(CODEC_NAMES))
RECORD = np.dtype(
    [
        ("stored_bytes", "<u4"),
        ("codec", "u1"),
        ("low_bits", "u1"),
        ("reserved", "u1", (2,)),
        ("xxh3", "<u8"),
    ]
)

MAX_LOW_BITS = 8

FEW_CHUNKS = 8
"""So many are looked at one by one: numpy's calls cost more than the checks."""

_HEADER_FIELDS = struct.Struct("<4sBBHQQII")
_RECORD_FIELDS = struct.Struct("<IBBHQ")

# Most chunks of a tensor whose sizes by geometry alone are cached: 256 KiB.
_KEPT_CHUNKS = 1 << 14


class Chunk(NamedTuple):
    """One chunk as plain numbers: slot [begin, end) in the payload, sizes, codec, checksum."""

    begin: int
    end: int
    stored_bytes: int
    raw_bytes: int
    codec: int
    xxh3: int


@dataclass(frozen=True)
class ChunkTable:
    """A validated chunk table.

    Attributes:
        grid: the tiles.
        planes: planes per tile.
        records: RECORD [len(grid) * planes]; chunk `tile * planes + plane`.
        offsets: int64 [len(records) + 1]: where each chunk's slot begins in the payload; the last
            is the payload's size.
        raw_bytes: int64 [len(records)]: symbols of each chunk.
    """

    grid: Grid
    planes: int
    records: NDArray[Any]
    offsets: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The same, one by one: numpy's scalars cost more than the checksum of a small chunk."""
        records = self.records
        sizes = (records["stored_bytes"], self.raw_bytes, records["codec"], records["xxh3"])
        columns = (self.offsets[:-1], self.offsets[1:], *sizes)
        return [
            Chunk._make(row) for row in zip(*(column.tolist() for column in columns), strict=True)
        ]

    @cached_property
    def low_bits(self) -> list[int]:
        """Of a wide `int8` tensor.

        Per tile, how many bits of its codes plane 0 holds (`schemes.int8.join_codes`).
        """
        bits_of_tiles: list[int] = self.records["low_bits"][1 :: self.planes].tolist()
        return bits_of_tiles

    def check_low_bits(self, wide: bool, *, file: str, tensor: str) -> None:
        """Refuses chunks whose `low_bits` does not fit their tensor.

        1 to 8 in plane 1 of a wide one, 0 elsewhere.

        Raises:
            SchemaError: the first that does not.
        """
        got = self.records["low_bits"]
        if not wide and not np.count_nonzero(got):
            return
        least, most = np.zeros(len(got), np.uint8), np.zeros(len(got), np.uint8)
        if wide:
            # Planes alternate, and plane 1 of a tile holds the number.
            least[1::2], most[1::2] = 1, MAX_LOW_BITS
        wrong = (got < least) | (got > most)
        if wrong.any():
            chunk = int(wrong.argmax())
            expected = f"{least[chunk]} to {most[chunk]}" if most[chunk] else 0
            raise SchemaError(
                "low_bits of the chunk record",
                file=file,
                tensor=tensor,
                chunk=chunk,
                got=int(got[chunk]),
                expected=expected,
            )


def slot_bytes(stored_bytes: Any) -> Any:
    """Returns the size of a chunk's slot: its stored bytes, zero padded to a multiple of 16.

    Args:
        stored_bytes: a number or an integer array.

    Examples:
        >>> slot_bytes(1), slot_bytes(16), slot_bytes(17)
        (16, 16, 32)
    """
    return (stored_bytes + (limits.SLOT_ALIGNMENT - 1)) & -limits.SLOT_ALIGNMENT


def pack_chunk_table(grid: Grid, planes: int, records: NDArray[Any]) -> bytes:
    """Builds the bytes of a table.

    Args:
        grid: the tiles.
        planes: planes per tile, 1 to 8.
        records: RECORD [len(grid) * planes], reserved bytes 0.
    """
    header = np.zeros((), HEADER)
    header["magic"], header["version"], header["planes"] = MAGIC, TABLE_VERSION, planes
    header["rows"], header["cols"] = grid.rows, grid.cols
    header["tile_rows"], header["tile_cols"] = grid.tile_rows, grid.tile_cols
    return header.tobytes() + records.astype(RECORD, copy=False).tobytes()


def parse_chunk_table(data: bytes, *, payload_bytes: int, file: str, tensor: str) -> ChunkTable:
    """Validates a table against the size of the payload that it describes.

    Raises:
        UnsupportedVersionError: a table version or codec that this reader does not know.
        SchemaError: wrong magic, or reserved bytes that are not zero.
        LimitError: a chunk, or the number of planes, passes its limit.
        LayoutError: the number of records, their sizes and the payload's size disagree.
    """
    where: dict[str, Any] = {"file": file, "tensor": tensor}
    if len(data) < HEADER.itemsize:
        raise LayoutError(
            "chunk table is shorter than its header",
            got=len(data),
            expected=HEADER.itemsize,
            **where,
        )
    fields = _HEADER_FIELDS.unpack_from(data)
    magic, version, planes, reserved_value, rows, cols, tile_rows, tile_cols = fields
    if magic != MAGIC:
        raise SchemaError("chunk table has a wrong magic", got=ascii(bytes(data[:4])), **where)
    if version != TABLE_VERSION:
        raise UnsupportedVersionError(
            "chunk table version", got=version, expected=TABLE_VERSION, **where
        )
    if reserved_value != 0:
        raise SchemaError("reserved bytes of the chunk table are not zero", **where)
    if not 1 <= planes <= limits.PLANES:
        raise LimitError("planes per tile", got=planes, expected=f"1 to {limits.PLANES}", **where)
    # Python's integers: this product cannot wrap around.
    if max(rows, 1) * max(cols, 1) > limits.ELEMENTS:
        raise LimitError("matrix of the chunk table is too large", got=f"{rows} x {cols}", **where)
    if not tile_rows or not tile_cols:
        raise LayoutError("tile has no extent", got=f"{tile_rows} x {tile_cols}", **where)
    if min(tile_rows, max(rows, 1)) * min(tile_cols, max(cols, 1)) > limits.CHUNK_RAW_BYTES:
        raise LimitError("chunk is too large", got=f"{tile_rows} x {tile_cols}", **where)
    grid = kept_grid(rows, cols, tile_rows, tile_cols)
    expected = HEADER.itemsize + len(grid) * planes * RECORD.itemsize
    if len(data) != expected:
        raise LayoutError("chunk table has a wrong size", got=len(data), expected=expected, **where)
    records = np.frombuffer(data, RECORD, offset=HEADER.itemsize)
    sizes = _kept_chunk_sizes if len(records) <= _KEPT_CHUNKS else _chunk_sizes
    raw_bytes, most = sizes(grid, planes)
    chunks = _sound_chunks(data, raw_bytes, most) if len(records) <= FEW_CHUNKS else None
    if chunks is not None and chunks[-1].end == payload_bytes:
        offsets = np.array([0, *(chunk.end for chunk in chunks)], np.int64)
        table = ChunkTable(grid, planes, records, offsets, raw_bytes)
        table.__dict__["chunks"] = chunks
        return table
    # int64: offsets are sums and pass 32 bits.
    stored_sizes = records["stored_bytes"].astype(np.int64)
    _check_records(records, stored_sizes, raw_bytes, most, where)
    offsets = np.zeros(len(records) + 1, np.int64)
    np.add.accumulate(slot_bytes(stored_sizes), out=offsets[1:])
    if int(offsets[-1]) != payload_bytes:
        raise LayoutError(
            "chunks do not add up to the payload",
            got=int(offsets[-1]),
            expected=payload_bytes,
            **where,
        )
    return ChunkTable(grid, planes, records, offsets, raw_bytes)


def join_chunk_tables(parts: list[bytes], grid: Grid, payload_bytes: list[int]) -> ChunkTable:
    """Validates the tables of tensors that are alike and have one tile, by few calls.

    Args:
        parts: the bytes of each table, one or more.
        grid: what the manifest says of each.
        payload_bytes: size of the payload of each.

    Returns:
        The table of the tensors one above the other as one matrix; the payload of each follows the
        one before.

    Raises:
        FormatError: `parse_chunk_table` refuses one of them, or has another grid; or they have
            different planes. It does not say which.
    """
    size = len(parts[0])
    planes = (size - HEADER.itemsize) // RECORD.itemsize
    symbols = grid.rows * grid.cols
    # Sizes first: parts of other sizes would join to other tables.
    if (
        not 1 <= planes <= limits.PLANES
        or not 0 < symbols <= limits.CHUNK_RAW_BYTES
        or any(len(part) != HEADER.itemsize + planes * RECORD.itemsize for part in parts)
    ):
        raise LayoutError("chunk tables differ in size")
    extent = grid.rows, grid.cols, grid.tile_rows, grid.tile_cols
    head = _HEADER_FIELDS.pack(MAGIC, TABLE_VERSION, planes, 0, *extent)
    if not all(part.startswith(head) for part in parts):
        raise LayoutError("chunk table and manifest disagree")
    tables = np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), size)
    records = np.ascontiguousarray(tables[:, HEADER.itemsize :]).reshape(-1).view(RECORD)
    raw_bytes = np.full(len(records), symbols, np.int64)
    stored_sizes = records["stored_bytes"].astype(np.int64)
    _check_records(records, stored_sizes, raw_bytes, limits.max_stored_bytes(raw_bytes), {})
    slots = slot_bytes(stored_sizes)
    if slots.reshape(-1, planes).sum(axis=1).tolist() != payload_bytes:
        raise LayoutError("chunks do not add up to the payload")
    offsets = np.zeros(len(records) + 1, np.int64)
    np.add.accumulate(slots, out=offsets[1:])
    joined_grid = Grid(len(parts) * grid.rows, grid.cols, grid.rows, grid.cols)
    return ChunkTable(joined_grid, planes, records, offsets, raw_bytes)


def _sound_chunks(
    data: bytes, raw_bytes: NDArray[np.int64], most: NDArray[np.int64]
) -> list[Chunk] | None:
    """Returns the chunks of a table, or None where it has none or `_check_records` refuses one."""
    chunks, begin = [], 0
    records = _RECORD_FIELDS.iter_unpack(memoryview(data)[HEADER.itemsize :])
    for record, raw, limit in zip(records, raw_bytes.tolist(), most.tolist(), strict=True):
        stored, codec, _, reserved_value, xxh3 = record
        if (
            reserved_value
            or codec not in CODEC_NAMES
            or not 1 <= stored <= limit
            or (codec == 0 and stored != raw)
        ):
            return None
        end = begin + slot_bytes(stored)
        chunks.append(Chunk(begin, end, stored, raw, codec, xxh3))
        begin = end
    return chunks or None


def _chunk_sizes(grid: Grid, planes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the symbols of each chunk, and the most bytes that it may take stored.

    Int64 [tiles * planes], read-only.
    """
    down, across = grid.down, grid.across
    rows, cols = min(grid.tile_rows, grid.rows), min(grid.tile_cols, grid.cols)
    symbols = np.full((down, across), rows * cols, np.int64)
    if symbols.size:
        last_rows, last_cols = (
            grid.rows - (down - 1) * grid.tile_rows,
            grid.cols - (across - 1) * grid.tile_cols,
        )
        symbols[-1] = last_rows * cols
        symbols[:, -1] = rows * last_cols
        symbols[-1, -1] = last_rows * last_cols
    raw_bytes = np.repeat(symbols.reshape(-1), planes)
    most: NDArray[np.int64] = limits.max_stored_bytes(raw_bytes)
    # The cache hands out the same arrays again: no caller may change them.
    raw_bytes.flags.writeable = most.flags.writeable = False
    return raw_bytes, most


_kept_chunk_sizes = lru_cache(maxsize=64)(_chunk_sizes)  # a model has many tensors of few shapes


def _check_records(
    records: NDArray[Any],
    stored: NDArray[np.int64],
    raw_bytes: NDArray[np.int64],
    most: NDArray[np.int64],
    where: dict[str, Any],
) -> None:
    if np.count_nonzero(records["reserved"]):  # a quarter of the time of any()
        chunk = int(records["reserved"].any(axis=1).argmax())
        raise SchemaError("reserved bytes of the chunk record are not zero", chunk=chunk, **where)
    unknown = ~_KNOWN_CODECS[records["codec"]]
    if np.count_nonzero(unknown):
        chunk = int(unknown.argmax())
        raise UnsupportedVersionError(
            "unknown codec id", chunk=chunk, got=int(records["codec"][chunk]), **where
        )
    wrong = (stored < 1) | (stored > most) | ((records["codec"] == 0) & (stored != raw_bytes))
    if np.count_nonzero(wrong):
        chunk = int(wrong.argmax())
        got, expected = int(stored[chunk]), int(raw_bytes[chunk])
        raise LayoutError(
            "stored_bytes does not fit the chunk", chunk=chunk, got=got, expected=expected, **where
        )
