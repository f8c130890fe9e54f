from __future__ import annotations

import numpy as np
import pytest

from codecllm.formats.chunk_table import RECORD, pack_chunk_table, parse_chunk_table, slot_bytes
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.entropy import entropy_bits, estimated_entropy_bits
from codecllm.formats.errors import LayoutError
from codecllm.formats.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.schemes.lossless import join_planes, split_planes, word_dtype
from codecllm.formats.tiling import DEFAULT_TILE_SYMBOLS, Grid, channel_matrix, default_grid, last_axis_matrix


@pytest.mark.parametrize(
    ("rows", "cols", "tile"),
    [
        (1, 1, (1, 1)),
        (5, 123, (5, 123)),
        (4096, 4096, (32, 4096)),
        (3, DEFAULT_TILE_SYMBOLS, (1, DEFAULT_TILE_SYMBOLS)),
        (2, DEFAULT_TILE_SYMBOLS + 1, (1, DEFAULT_TILE_SYMBOLS // 2 + 1)),
        (1, 300_001, (1, 100_001)),
        (65_537, 1, (65_537, 1)),
    ],
)
def test_default_tiles(rows, cols, tile):
    grid = default_grid(rows, cols)
    assert (grid.tile_rows, grid.tile_cols) == tile


@pytest.mark.parametrize("grid", [Grid(7, 5, 3, 2), Grid(1, 9, 1, 4), Grid(9, 1, 4, 1), Grid(6, 6, 6, 6), Grid(5, 5, 99, 99)])
def test_tiles_cover_the_matrix_once(grid):
    seen = np.zeros((grid.rows, grid.cols), int)
    for tile in grid:
        seen[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols] += 1
        assert tile.symbols == tile.rows * tile.cols
    assert (seen == 1).all()
    assert len(list(grid)) == len(grid)


@pytest.mark.parametrize("grid", [Grid(0, 7, 1, 7), Grid(7, 0, 7, 1)])
def test_a_matrix_without_elements_has_no_tiles(grid):
    assert len(grid) == 0


def test_source_order():
    assert Grid(7, 5, 3, 5).in_source_order
    assert Grid(7, 5, 1, 2).in_source_order
    assert not Grid(7, 5, 3, 2).in_source_order


def test_matrices():
    assert last_axis_matrix((2, 3, 4)) == (6, 4)
    assert channel_matrix((8, 4), 0, "row") == (8, 4)
    assert channel_matrix((4, 8), 1, "column") == (4, 8)
    assert channel_matrix((3, 8, 4), 1, "row") == (24, 4)
    assert channel_matrix((8, 2, 3), 0, "row") == (8, 6)
    for shape, axis, kind in [((8,), 0, "row"), ((8, 4), 2, "row"), ((8, 4), 0, "column")]:
        with pytest.raises(LayoutError):
            channel_matrix(shape, axis, kind)


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
    assert data[:32].hex() == "434c435401010000" + "0300000000000000" + "0500000000000000" + "02000000" + "05000000"
    assert data[32:].hex() == "07000000" + "01000000" + "0000000000000080" + "05000000" + "01000000" + "0100000000000080"


def test_chunk_table_round_trip():
    grid = Grid(7, 5, 3, 2)
    stored = np.arange(1, 19)
    table = parse_chunk_table(_table(grid, 2, stored), payload_bytes=16 * 16 + 2 * 32, file="f", tensor="t")
    assert (table.grid, table.planes) == (grid, 2)
    for chunk, record in enumerate(table.chunks):
        assert record.stored_bytes == stored[chunk]
        assert record.raw_bytes == grid.tile(chunk // 2).symbols
        assert (record.begin, record.end) == (int(table.offsets[chunk]), int(table.offsets[chunk + 1]))
        assert record.end - record.begin == slot_bytes(record.stored_bytes)
        assert record.xxh3 == (1 << 63) + chunk


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.planes])
def test_planes_come_back(dtype):
    rng = np.random.default_rng(0)
    if dtype.bits == 16:
        words = np.arange(1 << 16, dtype=np.uint16)
    else:
        words = rng.integers(0, 2 if dtype.name == "BOOL" else 1 << dtype.bits, 5000, dtype=word_dtype(dtype))
    planes = split_planes(words, dtype)
    assert len(planes) == dtype.planes
    assert np.array_equal(join_planes(planes, dtype), words)


def test_plane_0_of_bf16_is_the_exponent():
    words = np.array([0x3F80, 0xBF80, 0x0001, 0x7F81, 0xFFFF], np.uint16)
    assert split_planes(words, DTYPES["BF16"])[0].tolist() == [0x7F, 0x7F, 0, 0xFF, 0xFF]
    assert split_planes(words, DTYPES["BF16"])[1].tolist() == [0, 1, 2, 2, 0xFF]


def test_entropy():
    assert entropy_bits(np.zeros(100, np.uint8)) == 0
    assert entropy_bits(np.arange(256, dtype=np.uint8)) == pytest.approx(2048)
    assert entropy_bits(np.empty(0, np.uint8)) == 0
    symbols = np.random.default_rng(0).normal(128, 30, 1 << 17).clip(0, 255).astype(np.uint8)
    assert estimated_entropy_bits(symbols) == pytest.approx(entropy_bits(symbols), rel=0.003)


def test_rounding_to_bf16_is_that_of_the_definition():
    """Ties go to even; every bf16 value and every midpoint between neighbours."""
    values = np.arange(0, 0x7F80, dtype=np.uint32)
    exact = (values << 16).view(np.float32)
    assert np.array_equal(bits_from_float32(exact, "BF16"), values)
    ties = ((values << 16) + 0x8000).view(np.float32)
    assert np.array_equal(bits_from_float32(ties, "BF16"), values + (values & 1))
    above = ((values << 16) + 0x8001).view(np.float32)
    assert np.array_equal(bits_from_float32(above, "BF16"), values + 1)
    assert np.array_equal(bits_from_float32(-exact, "BF16"), values | 0x8000)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_finite_values_survive_both_ways(dtype):
    words = np.arange(1 << 16, dtype=np.uint16) if dtype != "F32" else np.arange(0, 1 << 32, 65_521, dtype=np.uint32)
    values = float32_from_bits(words, dtype)
    finite = np.isfinite(values)
    assert np.array_equal(bits_from_float32(values[finite], dtype), words[finite])
