"""The side tensor `X_tables`: frequency tables shared by groups of `rans` chunks (SPEC.md 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs import RANS_ID
from codecllm.formats.codecs.rans_table import MAX_TABLE_BYTES, FrequencyTable, parse_table
from codecllm.formats.errors import (
    LayoutError,
    SchemaError,
    UnsupportedVersionError,
)
from codecllm.formats.shards.chunk_table import ChunkTable
from codecllm.formats.tiling import Grid

MAGIC = b"CLRT"
TABLES_VERSION = 1

HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("planes", "u1"),
        ("reserved", "<u2"),
        ("group_rows", "<u4"),
        ("group_cols", "<u4"),
    ]
)
SIZE = np.dtype("<u2")


@dataclass(frozen=True, slots=True)
class GroupTables:
    """A tensor's validated `X_tables`; a table itself is read when a chunk needs it.

    Attributes:
        groups: tiles of tiles: the grid of tiles is the matrix whose rectangles the groups are.
        planes: planes per tile.
        offsets: int64 [groups * planes + 1]: where each table lies in `data`; an empty one is
            absent.
        data: the tables, one after another.
    """

    groups: Grid
    planes: int
    offsets: NDArray[np.int64]
    data: bytes
    _read: dict[int, FrequencyTable] = field(default_factory=dict)

    def place(self, tile: int, plane: int) -> int:
        """Returns the number of the table of a tile's plane."""
        row, col = divmod(tile, self.groups.cols)
        group = row // self.groups.tile_rows * self.groups.across + col // self.groups.tile_cols
        return group * self.planes + plane

    def table(self, tile: int, plane: int) -> FrequencyTable:
        """Returns the table of a tile's plane.

        Raises:
            DecodeError: it is malformed.
        """
        place = self.place(tile, plane)
        table = self._read.get(place)
        if table is None:  # two threads may both read it: they get equal tables
            table = parse_table(self.data[self.offsets[place] : self.offsets[place + 1]])
            self._read[place] = table
        return table


def tile_groups(grid: Grid, group_rows: int, group_cols: int) -> Grid:
    """Returns the groups: rectangles of group_rows x group_cols tiles, smaller at the far edges.

    Examples:
        >>> tile_groups(Grid(rows=50, cols=90, tile_rows=10, tile_cols=30), 2, 1)
        Grid(rows=5, cols=3, tile_rows=2, tile_cols=1)
    """
    return Grid(grid.down, grid.across, group_rows, group_cols)


def max_tables_bytes(chunks: int) -> int:
    """Returns the most bytes that the tables of `chunks` chunks take: one table a chunk.

    Examples:
        >>> max_tables_bytes(1000)
        547016
    """
    return HEADER.itemsize + chunks * (SIZE.itemsize + MAX_TABLE_BYTES)


def pack_group_tables(groups: Grid, planes: int, tables: list[bytes]) -> bytes:
    """Builds the bytes of `X_tables`.

    Args:
        groups: see `tile_groups`.
        planes: planes per tile.
        tables: packed tables of group 0's planes, then group 1's and so on; empty where no chunk
            needs one.
    """
    header = np.zeros((), HEADER)
    header["magic"], header["version"], header["planes"] = MAGIC, TABLES_VERSION, planes
    header["group_rows"], header["group_cols"] = groups.tile_rows, groups.tile_cols
    return (
        header.tobytes()
        + np.array([len(table) for table in tables], SIZE).tobytes()
        + b"".join(tables)
    )


def parse_group_tables(data: bytes, *, chunks: ChunkTable, file: str, tensor: str) -> GroupTables:
    """Validates the header and the sizes against the tensor's chunk table.

    Raises:
        UnsupportedVersionError: a version that this reader does not know.
        SchemaError: wrong magic, or reserved bytes that are not zero.
        LayoutError: planes, groups, sizes or the chunks that need a table disagree.
    """
    where: dict[str, Any] = {"file": file, "tensor": tensor}
    if len(data) < HEADER.itemsize:
        raise LayoutError(
            "rans tables are shorter than their header",
            got=len(data),
            expected=HEADER.itemsize,
            **where,
        )
    header = np.frombuffer(data, HEADER, count=1)[0]
    if bytes(header["magic"]) != MAGIC:
        raise SchemaError("rans tables have a wrong magic", got=ascii(bytes(data[:4])), **where)
    if header["version"] != TABLES_VERSION:
        raise UnsupportedVersionError(
            "version of rans tables", got=int(header["version"]), expected=TABLES_VERSION, **where
        )
    if header["reserved"] != 0:
        raise SchemaError("reserved bytes of the rans tables are not zero", **where)
    if header["planes"] != chunks.planes:
        raise LayoutError(
            "rans tables and chunk table disagree on planes", got=int(header["planes"]), **where
        )
    if not header["group_rows"] or not header["group_cols"]:
        raise LayoutError(
            "group has no extent", got=f"{header['group_rows']} x {header['group_cols']}", **where
        )
    groups = tile_groups(chunks.grid, int(header["group_rows"]), int(header["group_cols"]))
    count = len(groups) * chunks.planes
    if len(data) < HEADER.itemsize + count * SIZE.itemsize:
        raise LayoutError(
            "rans tables lack sizes", got=len(data), expected=f"{count} sizes", **where
        )
    sizes = np.frombuffer(data, SIZE, count, HEADER.itemsize).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    table_bytes = data[HEADER.itemsize + count * SIZE.itemsize :]
    if int(offsets[-1]) != len(table_bytes):
        raise LayoutError(
            "rans tables have a wrong size",
            got=len(table_bytes),
            expected=int(offsets[-1]),
            **where,
        )
    tables = GroupTables(groups, chunks.planes, offsets, table_bytes)
    _check_needed(tables, sizes, chunks, where)
    return tables


def join_group_tables(parts: list[bytes], chunks: ChunkTable) -> GroupTables:
    """Validates the `X_tables` of tensors of one tile each, by few calls.

    Args:
        parts: the bytes of each, one or more.
        chunks: the joined table of their chunks (`chunk_table.join_chunk_tables`).

    Raises:
        FormatError: `parse_group_tables` refuses one of them. It does not say which.
    """
    planes = chunks.planes
    begin = HEADER.itemsize + planes * SIZE.itemsize
    if any(not begin <= len(part) <= max_tables_bytes(planes) for part in parts):
        raise LayoutError("rans tables have a wrong size")
    heads = np.frombuffer(b"".join([part[:begin] for part in parts]), np.uint8)
    heads = heads.reshape(len(parts), begin)
    header = np.ascontiguousarray(heads[:, : HEADER.itemsize]).reshape(-1).view(HEADER)
    sizes = np.ascontiguousarray(heads[:, HEADER.itemsize :]).reshape(-1).view(SIZE)
    table_sizes = sizes.astype(np.int64)
    is_sound = (
        (header["magic"] == MAGIC)
        & (header["version"] == TABLES_VERSION)
        & (header["reserved"] == 0)
        & (header["planes"] == planes)
        & (header["group_rows"] > 0)
        & (header["group_cols"] > 0)
    )
    needs_table = chunks.records["codec"] == RANS_ID
    ends = table_sizes.reshape(-1, planes).sum(axis=1) + begin
    if (
        not is_sound.all()
        or ((table_sizes > 0) != needs_table).any()
        or ends.tolist() != list(map(len, parts))
    ):
        raise LayoutError("rans tables do not fit the chunks")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(table_sizes)])
    # Each tensor is one tile, which is a group of its own.
    groups = tile_groups(chunks.grid, 1, 1)
    return GroupTables(groups, planes, offsets, b"".join([part[begin:] for part in parts]))


def _check_needed(
    tables: GroupTables, sizes: NDArray[np.int64], chunks: ChunkTable, where: dict[str, Any]
) -> None:
    """Refuses a table that is missing, and one that no chunk uses."""
    rans_chunks = np.flatnonzero(chunks.records["codec"] == RANS_ID)
    row, col = np.divmod(rans_chunks // chunks.planes, max(1, chunks.grid.across))
    groups = tables.groups
    group = row // groups.tile_rows * groups.across + col // groups.tile_cols
    needs_table = np.zeros(len(sizes), np.bool_)
    needs_table[group * chunks.planes + rans_chunks % chunks.planes] = True
    # Both ways: a table that no chunk uses would be bytes that nothing checks.
    wrong = np.flatnonzero(needs_table != (sizes > 0))
    if len(wrong):
        got = "no table" if needs_table[wrong[0]] else "a table that no chunk uses"
        raise LayoutError(
            f"rans tables do not fit the chunks of group {wrong[0] // chunks.planes}",
            got=got,
            **where,
        )
