"""Tiles cover a matrix once and in order; entropy and rounding follow their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.formats.codecs.entropy import entropy_bits, estimated_entropy_bits
from codecllm.formats.errors import LayoutError
from codecllm.formats.schemes.float_bits import bits_from_float32, float32_from_bits
from codecllm.formats.tiling import (
    DEFAULT_TILE_SYMBOLS,
    Grid,
    channel_matrix,
    default_grid,
    last_axis_matrix,
)


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


@pytest.mark.parametrize(
    "grid",
    [Grid(7, 5, 3, 2), Grid(1, 9, 1, 4), Grid(9, 1, 4, 1), Grid(6, 6, 6, 6), Grid(5, 5, 99, 99)],
)
def test_tiles_cover_the_matrix_once(grid):
    seen = np.zeros((grid.rows, grid.cols), int)
    for tile in grid:
        seen[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols] += 1
        assert tile.symbols == tile.rows * tile.cols
    assert (seen == 1).all()
    assert len(list(grid)) == len(grid)


@pytest.mark.parametrize("grid", [Grid(0, 7, 1, 7), Grid(7, 0, 7, 1), Grid(0, 0, 5, 5)])
def test_a_matrix_without_elements_has_no_tiles(grid):
    assert (len(grid), list(grid)) == (0, [])


@pytest.mark.parametrize("numbers", [(1, 1, 0, 1), (1, 1, 1, 0), (-1, 1, 1, 1), (1, -1, 1, 1)])
def test_tiles_have_an_extent(numbers):
    with pytest.raises(LayoutError, match="no extent"):
        Grid(*numbers)


@pytest.mark.parametrize(
    "matrix", [(0, 7), (7, 0), (1, 1), (5, 123), (1, 65_537), (65_537, 3), (3, 131_073)]
)
def test_default_tiles_cover_the_matrix_in_source_order(matrix):
    grid = default_grid(*matrix)
    assert sum(tile.symbols for tile in grid) == matrix[0] * matrix[1]
    assert all(0 < tile.symbols <= DEFAULT_TILE_SYMBOLS for tile in grid)
    assert grid.in_source_order


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


def test_entropy_is_that_of_the_definition():
    symbols = np.repeat(np.array([3, 200, 7], np.uint8), [4, 2, 2])
    assert entropy_bits(symbols) == pytest.approx(4 * 1 + 2 * 2 + 2 * 2)
    assert estimated_entropy_bits(symbols) == entropy_bits(symbols)
    uniform = np.random.default_rng(1).integers(0, 256, 1 << 17).astype(np.uint8)
    assert 7.98 * uniform.size < estimated_entropy_bits(uniform) <= 8 * uniform.size
    assert estimated_entropy_bits(np.zeros(1 << 17, np.uint8)) == 0


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
    words = (
        np.arange(1 << 16, dtype=np.uint16)
        if dtype != "F32"
        else np.arange(0, 1 << 32, 65_521, dtype=np.uint32)
    )
    values = float32_from_bits(words, dtype)
    finite = np.isfinite(values)
    assert np.array_equal(bits_from_float32(values[finite], dtype), words[finite])
