"""Side tensors of many tensors, validated by few calls: what single ones pass passes, only that."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.formats.codecs.rans_groups import (
    join_group_tables,
    max_tables_bytes,
    pack_group_tables,
    parse_group_tables,
    tile_groups,
)
from codecllm.formats.errors import FormatError
from codecllm.formats.shards.chunk_table import (
    RECORD,
    join_chunk_tables,
    pack_chunk_table,
    parse_chunk_table,
    slot_bytes,
)
from codecllm.formats.tiling import Grid

GRID, PLANES, COUNT = Grid(3, 50, 3, 50), 2, 5
RAW, ZSTD, RANS = 0, 1, 2


def _table(number, codecs=(RANS, RAW)):
    records = np.zeros(PLANES, RECORD)
    records["codec"] = codecs
    records["stored_bytes"] = [20 + 9 * number, 150]
    records["xxh3"] = number + 1
    payload = int(slot_bytes(records["stored_bytes"].astype(np.int64)).sum())
    return pack_chunk_table(GRID, PLANES, records), payload


def _parse(part, payload):
    return parse_chunk_table(part, payload_bytes=payload, file="f", tensor="t")


def _parsed_group(part, chunk_part, payload):
    # The loader bounds the length before it reads the bytes.
    if len(part) > max_tables_bytes(PLANES):
        raise FormatError("too long")
    return parse_group_tables(part, chunks=_parse(chunk_part, payload), file="f", tensor="t")


def _outcome(function, *arguments):
    try:
        return function(*arguments)
    except FormatError:
        return None


def test_joined_chunk_tables_are_those_of_each():
    parts, payloads = zip(*map(_table, range(COUNT)), strict=True)
    joined = join_chunk_tables(list(parts), GRID, list(payloads))
    assert (joined.grid.rows, len(joined.grid), joined.planes) == (3 * COUNT, COUNT, PLANES)
    begin = 0
    for number, (part, payload) in enumerate(zip(parts, payloads, strict=True)):
        single, chunks = _parse(part, payload), slice(number * PLANES, (number + 1) * PLANES)
        assert np.array_equal(joined.records[chunks], single.records)
        assert np.array_equal(joined.raw_bytes[chunks], single.raw_bytes)
        assert np.array_equal(joined.offsets[chunks], begin + single.offsets[:-1])
        assert joined.grid.tile(number).row == 3 * number
        begin += payload
    assert joined.offsets[-1] == begin


@pytest.mark.parametrize("codecs", [(RANS, RAW), (RAW, RAW), (ZSTD, RANS)])
def test_a_changed_chunk_table_passes_where_it_passes_alone(codecs):
    parts, payloads = map(list, zip(*map(_table, range(COUNT)), strict=True))
    parts[2], payloads[2] = _table(2, codecs)
    changed = [parts[2], parts[2][:-1], parts[2] + b"\0", b""]
    for place in range(len(parts[2])):
        for bit in (0, 4, 7):
            one = bytearray(parts[2])
            one[place] ^= 1 << bit
            changed.append(bytes(one))
    for one in changed:
        single = _outcome(_parse, one, payloads[2])
        is_sound = single is not None and single.grid == GRID and single.planes == PLANES
        joined = _outcome(join_chunk_tables, [*parts[:2], one, *parts[3:]], GRID, payloads)
        assert (joined is not None) == is_sound
    assert _outcome(join_chunk_tables, parts, GRID, [*payloads[:-1], 1]) is None


def _group(number, sizes=(9, 0), groups=(1, 1)):
    grid = tile_groups(Grid(1, 1, 1, 1), *groups)
    return pack_group_tables(grid, PLANES, [bytes([number]) * size for size in sizes])


def test_joined_rans_tables_are_those_of_each():
    parts, payloads = zip(*map(_table, range(COUNT)), strict=True)
    groups = [_group(number, (9 + number, 0), (1 + number, 2)) for number in range(COUNT)]
    chunks = join_chunk_tables(list(parts), GRID, list(payloads))
    joined = join_group_tables(groups, chunks)
    for number, (group, part, payload) in enumerate(zip(groups, parts, payloads, strict=True)):
        single = _parsed_group(group, part, payload)
        for plane in range(PLANES):
            assert _packed(joined, number, plane) == _packed(single, 0, plane)


def _packed(tables, tile, plane):
    place = tables.place(tile, plane)
    return tables.data[tables.offsets[place] : tables.offsets[place + 1]]


def test_a_changed_rans_table_passes_where_it_passes_alone():
    parts, payloads = map(list, zip(*map(_table, range(COUNT)), strict=True))
    groups = [_group(number) for number in range(COUNT)]
    chunks = join_chunk_tables(parts, GRID, payloads)
    long = max_tables_bytes(PLANES)
    changed = [groups[2][:-1], groups[2] + b"\0", b"", _group(2, (0, 0)), _group(2, (9, 1))]
    changed.append(_group(2, (long, 0)))
    for place in range(len(groups[2])):
        for bit in (0, 4, 7):
            one = bytearray(groups[2])
            one[place] ^= 1 << bit
            changed.append(bytes(one))
    for one in changed:
        single = _outcome(_parsed_group, one, parts[2], payloads[2])
        joined = _outcome(join_group_tables, [*groups[:2], one, *groups[3:]], chunks)
        assert (joined is None) == (single is None)
