"""Kernels from symbols to elements, and int8 products, give the bits of their references.

Without a GPU they run under Triton's interpreter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codecllm.formats.dtypes import DTYPES
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.schemes.int8 import MAX_SCALE, MIN_SCALE
from codecllm.formats.schemes.lossless import split_planes, word_dtype
from codecllm.formats.tiling import Grid
from codecllm.loader.kernels.assemble import assemble_lossless, can_assemble
from codecllm.loader.kernels.dequantize import dequantize_int8, untile_codes
from codecllm.loader.kernels.int8_linear import Panels, Rows, Tiles, choose_way, int8_linear

pytestmark = pytest.mark.gpu_too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE_OF = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ODD = [
    Grid(7, 33, 2, 10),
    Grid(3, 4100, 2, 4100),
    Grid(1, 5000, 1, 1250),
    Grid(70, 5, 32, 3),
    Grid(5, 1, 5, 1),
]
EMPTY = [Grid(0, 8, 1, 8), Grid(8, 0, 1, 1)]

# numpy, which the interpreter computes with, says that a float16 overflows; that it becomes an
# infinity is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def in_tiles(matrix, grid):
    parts = [
        matrix[t.row : t.row + t.rows, t.col : t.col + t.cols].reshape(-1).view(np.uint8)
        for t in grid
    ]
    return torch.from_numpy(np.concatenate([*parts, np.empty(0, np.uint8)])).to(DEVICE)


def there(array):
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def bits(tensor):
    return tensor.cpu().view(torch.uint8).numpy().tobytes()


def assemble(words, grid, name):
    dtype = DTYPES[name]
    planes = [
        in_tiles(plane.reshape(grid.rows, grid.cols), grid)
        for plane in split_planes(words.reshape(-1), dtype)
    ]
    out = torch.zeros(grid.rows, grid.cols, dtype=WORDS[dtype.itemsize], device=DEVICE)
    assemble_lossless(planes, grid, dtype, out)
    return bits(out)


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_every_16_bit_pattern_is_assembled(name):
    words = np.arange(1 << 16, dtype=np.uint16)
    assert assemble(words, Grid(64, 1024, 64, 1024), name) == words.tobytes()


@pytest.mark.parametrize("grid", ODD + EMPTY, ids=str)
@pytest.mark.parametrize("name", ["BF16", "F32", "F64", "F8_E4M3"])
def test_elements_are_assembled_from_any_tiles(grid, name):
    words = np.random.default_rng(3).integers(
        0, 1 << DTYPES[name].bits, grid.rows * grid.cols, np.uint64
    )
    words = words.astype(word_dtype(DTYPES[name]))
    assert assemble(words, grid, name) == words.tobytes()


def test_which_types_are_assembled():
    assert {name for name, dtype in DTYPES.items() if can_assemble(dtype)} == {
        name for name, dtype in DTYPES.items() if dtype.planes and name != "BOOL"
    }


@pytest.mark.parametrize("change", ["planes", "size", "dtype", "strided"])
def test_planes_that_do_not_fit_are_refused(change):
    grid, planes, out = (
        Grid(2, 6, 2, 6),
        [torch.zeros(12, dtype=torch.uint8)] * 2,
        torch.zeros(2, 6, dtype=torch.int16),
    )
    if change == "planes":
        planes = planes[:1]
    elif change == "size":
        planes = [planes[0], planes[1][:11]]
    elif change == "dtype":
        out = out.int()
    else:
        out = torch.zeros(2, 12, dtype=torch.int16)[:, ::2]
    with pytest.raises(ValueError, match=r"cannot assemble|plane|output"):
        assemble_lossless(planes, grid, DTYPES["BF16"], out)


def dequantize(low, high, grid, row_scale, col_scale, order, kind, name, low_bits=None):
    stored = [part if part is None or order is None else part[:, order] for part in (low, high)]
    planes = [None if part is None else in_tiles(part, grid) for part in stored]
    out = torch.zeros(grid.rows, grid.cols, dtype=DTYPE_OF[name], device=DEVICE)
    sides = (there(row_scale), there(col_scale), there(order))
    dequantize_int8(planes[0], planes[1], there(low_bits), grid, *sides, kind, out)
    return bits(out)


def reference(low, high, steps, name, factors=None):
    codes = (
        low.astype(np.float32)
        if high is None
        else low.astype(np.int32) + factors * high.astype(np.int32)
    )
    with np.errstate(over="ignore"):
        return bits_from_float32(codes.astype(np.float32) * steps, name).tobytes()


def factors(grid, low_bits, order):
    """Of each element, columns in the source's order, the factor of its high part."""
    stored = np.zeros((grid.rows, grid.cols), np.int32)
    for tile, bits_of_tile in zip(
        grid, low_bits if low_bits is not None else [], strict=low_bits is not None
    ):
        stored[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols] = 1 << int(
            bits_of_tile
        )
    source = stored.copy()
    if order is not None:
        source[:, order] = stored
    return source


@pytest.mark.parametrize("name", DTYPE_OF)
def test_every_code_times_scales_of_every_size(name):
    codes = np.tile(np.arange(-127, 128, dtype=np.int8), (60, 1))
    scales = np.exp2(np.linspace(-126, 120.9, 60)).astype(np.float32)
    # Halfway between two bfloat16 or float16, subnormal and infinite as float16, and the two ends.
    scales[:8] = np.array(
        [1.00390625, 1.01171875, 1.00048828125, 2**-24, 2**-25, 516.1, MIN_SCALE, MAX_SCALE],
        np.float32,
    )
    got = dequantize(codes, None, Grid(60, 255, 16, 255), scales, None, None, "row", name)
    assert got == reference(codes, None, scales[:, None], name)


@pytest.mark.parametrize("grid", ODD + EMPTY, ids=str)
@pytest.mark.parametrize("kind", ["row", "column"])
def test_codes_are_dequantized_from_any_tiles(grid, kind):
    rng = np.random.default_rng(4)
    codes = rng.integers(-127, 128, (grid.rows, grid.cols)).astype(np.int8)
    scales = np.exp(rng.uniform(-20, 5, grid.rows if kind == "row" else grid.cols)).astype(
        np.float32
    )
    steps = scales[:, None] if kind == "row" else scales[None]
    assert dequantize(codes, None, grid, scales, None, None, kind, "BF16") == reference(
        codes, None, steps, "BF16"
    )


@pytest.mark.parametrize("grid", ODD, ids=str)
@pytest.mark.parametrize(("wide", "moved"), [(False, True), (True, False), (True, True)])
def test_column_scales_orders_and_wide_codes(grid, wide, moved):
    rng = np.random.default_rng(5)
    low = rng.integers(-128 if wide else -127, 128, (grid.rows, grid.cols)).astype(np.int8)
    high = rng.integers(-127, 128, low.shape).astype(np.int8) if wide else None
    rows, cols = (np.exp(rng.uniform(-9, 1, size)).astype(np.float32) for size in low.shape)
    order = rng.permutation(grid.cols).astype(np.int32) if moved else None
    low_bits = rng.integers(1, 9, len(grid)).astype(np.int32) if wide else None
    got = dequantize(low, high, grid, rows, cols, order, "row", "BF16", low_bits)
    assert got == reference(
        low, high, rows[:, None] * cols[None], "BF16", factors(grid, low_bits, order)
    )
    out = torch.zeros(grid.rows, grid.cols, dtype=torch.int8, device=DEVICE)
    untile_codes(in_tiles(low if order is None else low[:, order], grid), grid, out, there(order))
    assert bits(out) == low.tobytes()


def test_scales_that_do_not_fit_are_refused():
    grid, low = Grid(2, 6, 2, 6), torch.zeros(12, dtype=torch.uint8)
    out = torch.zeros(2, 6, dtype=torch.bfloat16)
    for rows, cols, kind in (
        (3, None, "row"),
        (2, 5, "row"),
        (2, None, "column"),
        (6, 6, "column"),
    ):
        col_scale = None if cols is None else torch.ones(cols)
        with pytest.raises(ValueError, match="scale"):
            dequantize_int8(low, None, None, grid, torch.ones(rows), col_scale, None, kind, out)


WAYS = [
    (1, Rows(4, 256)),
    (1, Rows(2)),
    (1, Rows(1)),
    (3, Tiles(32, 16, 64, 4, 3)),
    (33, Tiles(16, 16, 32, 4, 3)),
    (3, Tiles(32, 16, 32, 4, 3, 2)),
    (17, Tiles(16, 16, 64, 4, 3, 4)),
    (3, Panels(1)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "way"), WAYS, ids=str)
def test_products_are_within_the_stated_tolerance(tokens, way, dtype):
    """Both bounds hold for each element; the interpreter truncates bfloat16: first bound x 2."""
    rows, cols = 37, 144
    generator = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(tokens, cols, generator=generator).to(dtype).to(DEVICE)
    codes = torch.randint(-128, 128, (rows, cols), dtype=torch.int8, generator=generator).to(DEVICE)
    scale = (torch.rand(rows, generator=generator) * 1e-2 + 1e-4).to(DEVICE)
    weight = codes.double() * scale.double()[:, None]
    exact = inputs.double() @ weight.T
    found = int8_linear(inputs, codes, scale, None, way).double()
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-11
    spread = inputs.double().abs() @ weight.abs().T
    # Panels hold weights rounded to the dtype, as a dense layer's.
    allowed = (
        rounding * exact.abs()
        + spread * (rounding if isinstance(way, Panels) else cols * 2.0**-24)
        + 2.0**-24
    )
    assert ((found - exact).abs() <= allowed).all()
    bias = torch.ones(rows, dtype=dtype, device=DEVICE) * 64
    biased = int8_linear(inputs.view(1, tokens, cols), codes, scale, bias, way)
    assert biased.shape == (1, tokens, rows)
    assert ((biased[0].double() - exact - 64).abs() <= allowed + 65 * rounding).all()


def test_few_tokens_of_aligned_columns_get_a_kernel_and_the_rest_panels():
    chosen = [
        type(choose_way(tokens, 4096, cols))
        for tokens, cols in ((1, 4096), (8, 4096), (1, 4097), (2048, 4096))
    ]
    assert chosen == [Rows, Tiles, Panels, Panels]


def test_inputs_that_do_not_fit_are_refused():
    codes, scale = torch.zeros(4, 16, dtype=torch.int8), torch.ones(4)
    for inputs in (torch.zeros(1, 16), torch.zeros(1, 15, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="does not fit"):
            int8_linear(inputs, codes, scale, None)
    with pytest.raises(ValueError, match="float32"):
        int8_linear(torch.zeros(1, 16, dtype=torch.bfloat16), codes, scale.double(), None)
