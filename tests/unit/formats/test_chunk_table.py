"""Chunk tables: exact bytes, and one typed error for each flaw."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.formats import limits
from codecllm.formats.errors import (
    FormatError,
    LayoutError,
    LimitError,
    SchemaError,
    UnsupportedVersionError,
)
from codecllm.formats.shards import chunk_table
from codecllm.formats.shards.chunk_table import (
    RECORD,
    pack_chunk_table,
    parse_chunk_table,
    slot_bytes,
)
from codecllm.formats.tiling import Grid


def _table(grid, planes, stored):
    records = np.zeros(len(grid) * planes, RECORD)
    records["stored_bytes"], records["codec"], records["xxh3"] = (
        stored,
        1,
        np.arange(len(records), dtype=np.uint64) + np.uint64(1 << 63),
    )
    return pack_chunk_table(grid, planes, records)


def test_chunk_table_exact_bytes():
    data = _table(Grid(3, 5, 2, 5), 1, [7, 5])
    assert (
        data[:32].hex()
        == "434c435401010000" + "0300000000000000" + "0500000000000000" + "02000000" + "05000000"
    )
    assert (
        data[32:].hex()
        == "07000000"
        + "01000000"
        + "0000000000000080"
        + "05000000"
        + "01000000"
        + "0100000000000080"
    )


def test_chunk_table_round_trip():
    grid = Grid(7, 5, 3, 2)
    stored = np.arange(1, 19)
    table = parse_chunk_table(
        _table(grid, 2, stored), payload_bytes=16 * 16 + 2 * 32, file="f", tensor="t"
    )
    assert (table.grid, table.planes) == (grid, 2)
    for chunk, record in enumerate(table.chunks):
        assert record.stored_bytes == stored[chunk]
        assert record.raw_bytes == grid.tile(chunk // 2).symbols
        assert (record.begin, record.end) == (
            int(table.offsets[chunk]),
            int(table.offsets[chunk + 1]),
        )
        assert record.end - record.begin == slot_bytes(record.stored_bytes)
        assert record.xxh3 == (1 << 63) + chunk


def test_tiles_may_be_larger_than_the_matrix():
    table = _parse(_table(Grid(3, 5, 2**32 - 1, 2**32 - 1), 2, [7, 15]))
    assert table.raw_bytes.tolist() == [15, 15]
    assert len(_parse(_table(Grid(0, 5, 2**32 - 1, 1), 1, []), 0).records) == 0


@pytest.mark.parametrize(
    ("stored", "slot"), [(0, 0), (1, 16), (15, 16), (16, 16), (17, 32), (2**32 - 1, 2**32)]
)
def test_slots(stored, slot):
    assert slot_bytes(stored) == slot


def _good():
    return bytearray(_table(Grid(4, 6, 2, 6), 1, [10, 12])), 32


def _parse(data, payload_bytes=32):
    return parse_chunk_table(bytes(data), payload_bytes=payload_bytes, file="f", tensor="t")


FLAWS = {
    "magic": (0, b"CLCU", SchemaError, "magic", None),
    "version 0": (4, b"\0", UnsupportedVersionError, "version", None),
    "version 2": (4, b"\2", UnsupportedVersionError, "version", None),
    "planes 0": (5, b"\0", LimitError, "planes", None),
    "planes 9": (5, b"\x09", LimitError, "planes", None),
    "planes 2": (5, b"\2", LayoutError, "wrong size", None),
    "reserved low": (6, b"\1", SchemaError, "reserved", None),
    "reserved high": (7, b"\x80", SchemaError, "reserved", None),
    "matrix of 2^49": (8, (2**49).to_bytes(8, "little"), LimitError, "matrix", None),
    "matrix of 2^64 - 1 rows": (8, b"\xff" * 8, LimitError, "matrix", None),
    "matrix of 2^63 rows without columns": (
        8,
        bytes(7) + b"\x80" + bytes(8),
        LimitError,
        "matrix",
        None,
    ),
    "no rows": (8, bytes(8), LayoutError, "wrong size", None),
    "tile of 0 rows": (24, bytes(4), LayoutError, "no extent", None),
    "tile of 0 columns": (28, bytes(4), LayoutError, "no extent", None),
    "a chunk of 1 GiB": (
        8,
        (2**15).to_bytes(8, "little") * 2 + b"\xff" * 8,
        LimitError,
        "chunk is too large",
        None,
    ),
    "tiles of one": (24, b"\1\0\0\0" * 2, LayoutError, "wrong size", None),
    "stored 0": (32, bytes(4), LayoutError, "stored_bytes", 0),
    "stored 2^32 - 1": (48, b"\xff" * 4, LayoutError, "stored_bytes", 1),
    "stored one slot more": (48, b"\x11", LayoutError, "add up", None),
    "codec 3": (36, b"\3", UnsupportedVersionError, "codec id", 0),
    "codec 128": (52, b"\x80", UnsupportedVersionError, "codec id", 1),
    "codec raw of another size": (36, b"\0", LayoutError, "stored_bytes", 0),
    "record reserved": (54, b"\1", SchemaError, "reserved", 1),
    "record reserved at the end": (39, b"\1", SchemaError, "reserved", 0),
}


@pytest.mark.parametrize("name", FLAWS)
def test_flaw_has_its_error(name):
    offset, change, expected, words, chunk = FLAWS[name]
    data, payload = _good()
    assert _parse(data, payload).planes == 1
    data[offset : offset + len(change)] = change
    with pytest.raises(expected, match=words) as caught:
        _parse(data, payload)
    assert type(caught.value) is expected
    assert (caught.value.file, caught.value.tensor, caught.value.chunk) == ("f", "t", chunk)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 47, 63, 65, 80])
def test_tables_of_another_length(length):
    data, payload = _good()
    with pytest.raises(LayoutError, match="chunk table"):
        _parse((bytes(data) + bytes(100))[:length], payload)


@pytest.mark.parametrize("payload", [0, 16, 31, 33, 48])
def test_payloads_of_another_size(payload):
    with pytest.raises(LayoutError, match="add up"):
        _parse(_good()[0], payload)


def test_stored_bytes_up_to_the_limit():
    largest = limits.max_stored_bytes(12)
    assert largest == 12 + 1024
    assert (
        _parse(_table(Grid(4, 6, 2, 6), 1, [largest, 12]), slot_bytes(largest) + 16)
        .chunks[0]
        .stored_bytes
        == largest
    )
    with pytest.raises(LayoutError, match="stored_bytes"):
        _parse(_table(Grid(4, 6, 2, 6), 1, [largest + 1, 12]), slot_bytes(largest) + 16)


def test_a_table_without_chunks():
    table = _parse(_table(Grid(0, 6, 2, 6), 3, []), 0)
    assert (table.chunks, table.offsets.tolist()) == ([], [0])


def _verdict(data, payload_bytes):
    try:
        table = parse_chunk_table(data, payload_bytes=payload_bytes, file="f", tensor="t")
    except FormatError as exc:
        return str(exc)
    arrays = table.records.tobytes(), table.offsets.tolist(), table.raw_bytes.tolist()
    return table.grid, table.planes, arrays, table.chunks


@pytest.mark.parametrize("planes", [1, 2])
def test_short_tables_are_judged_as_long_ones_are(monkeypatch, planes):
    """Looked at one by one, and by numpy: whole tables, and each byte of them changed."""
    grid = Grid(4, 5, 2, 5)
    chunks = len(grid) * planes
    whole = _table(grid, planes, [10, 3, 8, 1][:chunks])
    payload_bytes = 16 * chunks
    changed = [whole]
    for place in range(len(whole)):
        for bits in (1, 0x80, 0xFF):
            data = bytearray(whole)
            data[place] ^= bits
            changed.append(bytes(data))
    cases = [(data, size) for data in changed for size in (payload_bytes, payload_bytes + 16)]
    found = [_verdict(*case) for case in cases]
    monkeypatch.setattr(chunk_table, "FEW_CHUNKS", -1)
    assert found == [_verdict(*case) for case in cases]
    kinds = [isinstance(verdict, tuple) for verdict in found]
    assert kinds.count(True) > 10 * chunks
    assert kinds.count(False) > 10 * chunks
