"""Products with int8 weights on a GPU: y = x @ (codes * scale).T + bias, in one of three ways.

A few tokens cost the bytes of the weight: `_rows_kernel` multiplies in float32 registers,
`_tiles_kernel` with matrix units. Both read codes once, one byte a weight, and apply a row's scale
once, to its sum. int8 is exact in bfloat16, float16 and float32, so no weight is rounded, as a
dense layer's are. The remaining error is the order of summation and the rounding of the result:
|y - exact| <= 2^-8 |y| (one rounding to bfloat16; 2^-11 for float16) + K * 2^-24 * sum |x| |w|.
Many tokens cost arithmetic: `panels` dequantizes rows into scratch that stays in the second-level
cache and leaves the product to cuBLAS: its weights are the dense ones, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from codecllm.formats.tiling import Grid
from codecllm.loader.kernels.dequantize import dequantize_int8
from codecllm.loader.kernels.on_device import on_device_of

_ALIGNED = 16
_PROGRAMS = 220
"""Programs that `_tiles_kernel` should at least have: fewer leave an H100's memory idle."""

_MIN_COLUMNS = 512
"""Fewest columns for a program of `_tiles_kernel`."""

_SUMMED = 1024
"""Outputs of a program of `_sum_kernel`."""

_MAGIC = tl.constexpr(0x4B000000)
_MAGIC_VALUE = tl.constexpr(8388736.0)


@dataclass(frozen=True, slots=True)
class Rows:
    """Setting of `_rows_kernel`, for one token: rows per program (1, 2, 4), bytes a step, warps."""

    rows: int
    bytes: int = 2048
    warps: int = 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """Setting of `_tiles_kernel`: rows, tokens and columns per step, warps, pipeline stages.

    With several `splits` as many programs share the columns of a tile, and another kernel adds up
    their sums, in order.
    """

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True, slots=True)
class Panels:
    """Setting of `panels`: bytes of dequantized weights at once; large products fill a device."""

    bytes: int = 40 << 20


Way = Rows | Tiles | Panels


def choose_way(tokens: int, rows: int, cols: int) -> Way:
    """Returns the way to multiply `tokens` inputs with a weight [rows, cols]."""
    if cols % _ALIGNED == 0:
        if tokens == 1:
            return Rows(2)
        if tokens <= 16:
            return Tiles(32, 16, 256, 4, 4, _splits(rows, cols, 32))
        if tokens <= 64:
            return Tiles(64, triton.next_power_of_2(tokens), 128, 4, 4, _splits(rows, cols, 64))
    return Panels()


def _splits(rows: int, cols: int, tile_rows: int) -> int:
    """Returns the programs that share the columns of a tile: enough to fill a large device."""
    splits = 1
    while splits * triton.cdiv(rows, tile_rows) < _PROGRAMS and cols // splits >= 2 * _MIN_COLUMNS:
        splits *= 2
    return splits


def int8_linear(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    way: Way | None = None,
) -> torch.Tensor:
    """Multiplies inputs with the transposed weight codes * scale.

    Bytes moved: rows * cols of codes, beside inputs and outputs. The floor is rows * cols over the
    memory bandwidth, or 2 * tokens * rows * cols operations over the matrix units' rate.

    Args:
        inputs: bfloat16 or float16 [..., cols], on the device.
        codes: int8 [rows, cols], contiguous.
        scale: float32 [rows].
        bias: dtype of the inputs [rows], or None.
        way: instead of `choose_way`'s choice.

    Returns:
        [..., rows], dtype of the inputs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit: a mistake of the caller.
    """
    rows, cols = codes.shape
    if (
        inputs.dtype not in (torch.bfloat16, torch.float16)
        or inputs.shape[-1] != cols
        or scale.shape != (rows,)
    ):
        got = f"{inputs.dtype} {list(inputs.shape)}"
        raise ValueError(
            f"{got} does not fit codes {list(codes.shape)} and scale {list(scale.shape)}"
        )
    if codes.dtype != torch.int8 or not codes.is_contiguous() or scale.dtype != torch.float32:
        raise ValueError("codes are not contiguous int8, or the scale is not float32")
    if any(part is not None and part.device != inputs.device for part in (codes, scale, bias)):
        raise ValueError(
            f"inputs lie on {inputs.device}, codes on {codes.device}, the scale on {scale.device}"
        )
    flat = inputs.reshape(-1, cols).contiguous()
    tokens = flat.shape[0]
    out = torch.empty(tokens, rows, dtype=inputs.dtype, device=inputs.device)
    if out.numel():
        way = way or choose_way(tokens, rows, cols)
        if flat.data_ptr() % _ALIGNED or codes.data_ptr() % _ALIGNED:
            way = Panels()
        with on_device_of(flat):
            _RUN[type(way)](flat, codes, scale, bias, out, way)
    return out.view(*inputs.shape[:-1], rows)


def _by_rows(flat, codes, scale, bias, out, way):
    rows, quads = codes.shape[0], codes.shape[1] // 4
    _rows_kernel[(triton.cdiv(rows, way.rows),)](
        flat.view(torch.int64),
        codes.view(torch.int32),
        scale,
        codes if bias is None else bias,
        out,
        rows,
        quads,
        HAS_BIAS=bias is not None,
        IS_BFLOAT16=flat.dtype == torch.bfloat16,
        EVEN=quads % (way.bytes // 4) == 0,
        ROWS=way.rows,
        QUADS=way.bytes // 4,
        num_warps=way.warps,
    )


def _by_tiles(flat, codes, scale, bias, out, way):
    tokens, (rows, cols) = flat.shape[0], codes.shape
    sums = (
        out
        if way.splits == 1
        else torch.empty(way.splits, tokens, rows, dtype=torch.float32, device=out.device)
    )
    _tiles_kernel[(triton.cdiv(rows, way.rows) * triton.cdiv(tokens, way.tokens), way.splits)](
        flat,
        codes,
        scale,
        codes if bias is None else bias,
        sums,
        tokens,
        rows,
        cols,
        HAS_BIAS=bias is not None,
        EVEN=cols % (way.columns * way.splits) == 0,
        SPLITS=way.splits,
        WIDENS=flat.device.type == "cpu",  # Triton's interpreter multiplies the bits of bfloat16
        ROWS=way.rows,
        TOKENS=way.tokens,
        COLUMNS=way.columns,
        num_warps=way.warps,
        num_stages=way.stages,
    )
    if way.splits > 1:
        _sum_kernel[(triton.cdiv(rows, _SUMMED), tokens)](
            sums,
            scale,
            codes if bias is None else bias,
            out,
            tokens,
            rows,
            HAS_BIAS=bias is not None,
            SPLITS=way.splits,
            BLOCK=_SUMMED,
        )


def _by_panels(flat, codes, scale, bias, out, way):
    rows, cols = codes.shape
    step = min(rows, max(128, way.bytes // (2 * max(cols, 1)) // 128 * 128))
    scratch = torch.empty(step, cols, dtype=flat.dtype, device=flat.device)
    low = codes.view(torch.uint8).view(-1)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        panel = scratch[: last - first]
        grid = Grid(last - first, cols, last - first, max(cols, 1))
        dequantize_int8(
            low[first * cols : last * cols],
            None,
            None,
            grid,
            scale[first:last],
            None,
            None,
            "row",
            panel,
        )
        if bias is None:
            torch.mm(flat, panel.t(), out=out[:, first:last])
        else:
            torch.addmm(bias[first:last], flat, panel.t(), out=out[:, first:last])


_RUN = {Rows: _by_rows, Tiles: _by_tiles, Panels: _by_panels}


@triton.jit
def _widen(bits, IS_BFLOAT16: tl.constexpr):
    """Returns the float32 value of the input in the low 16 bits of each uint32."""
    if IS_BFLOAT16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _code(words, BYTE: tl.constexpr):
    """Returns one of the four codes in each uint32, whose bytes are code + 128, as float32.

    A byte put into the last bits of 2^23 is 2^23 + byte: conversions of integers are slower than
    this.
    """
    return (((words >> (8 * BYTE)) & 0xFF) | _MAGIC).to(tl.float32, bitcast=True) - _MAGIC_VALUE


@triton.jit
def _products(codes, row, rows, quads, quad, x0, x1, x2, x3, EVEN: tl.constexpr):
    """Returns sums of four products of a row of codes; a missing row is read as the last."""
    start = codes + tl.minimum(row, rows - 1).to(tl.int64) * quads
    if EVEN:
        words = tl.load(start + quad, eviction_policy="evict_first")
    else:
        words = tl.load(start + quad, mask=quad < quads, other=0, eviction_policy="evict_first")
    words = words.to(tl.uint32, bitcast=True) ^ 0x80808080
    return x0 * _code(words, 0) + x1 * _code(words, 1) + x2 * _code(words, 2) + x3 * _code(words, 3)


@triton.jit
def _finish_row(sums, row, rows, scale, bias, out, HAS_BIAS: tl.constexpr):
    value = tl.sum(sums, axis=0) * tl.load(scale + row, mask=row < rows, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, value.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _rows_kernel(
    inputs,
    codes,
    scale,
    bias,
    out,
    rows,
    quads,
    HAS_BIAS: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    # One-dimensional blocks, one for each row: inputs and codes then have the same place in the
    # same threads.
    sums0 = tl.zeros((QUADS,), tl.float32)
    sums1 = tl.zeros((QUADS,), tl.float32)
    sums2 = tl.zeros((QUADS,), tl.float32)
    sums3 = tl.zeros((QUADS,), tl.float32)
    for first in range(0, quads, QUADS):
        quad = first + tl.arange(0, QUADS)
        vector = (
            tl.load(inputs + quad) if EVEN else tl.load(inputs + quad, mask=quad < quads, other=0)
        )
        vector = vector.to(tl.uint64, bitcast=True)
        x0 = _widen(vector.to(tl.uint32) & 0xFFFF, IS_BFLOAT16)
        x1 = _widen(vector.to(tl.uint32) >> 16, IS_BFLOAT16)
        x2 = _widen((vector >> 32).to(tl.uint32) & 0xFFFF, IS_BFLOAT16)
        x3 = _widen((vector >> 48).to(tl.uint32), IS_BFLOAT16)
        sums0 += _products(codes, row, rows, quads, quad, x0, x1, x2, x3, EVEN)
        if ROWS >= 2:
            sums1 += _products(codes, row + 1, rows, quads, quad, x0, x1, x2, x3, EVEN)
        if ROWS >= 4:
            sums2 += _products(codes, row + 2, rows, quads, quad, x0, x1, x2, x3, EVEN)
            sums3 += _products(codes, row + 3, rows, quads, quad, x0, x1, x2, x3, EVEN)
    _finish_row(sums0, row, rows, scale, bias, out, HAS_BIAS)
    if ROWS >= 2:
        _finish_row(sums1, row + 1, rows, scale, bias, out, HAS_BIAS)
    if ROWS >= 4:
        _finish_row(sums2, row + 2, rows, scale, bias, out, HAS_BIAS)
        _finish_row(sums3, row + 3, rows, scale, bias, out, HAS_BIAS)


@triton.jit
def _tiles_kernel(
    inputs,
    codes,
    scale,
    bias,
    out,
    tokens,
    rows,
    cols,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDENS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(tokens, TOKENS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) % across * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    weights = codes + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * cols + column[None, :]
    vectors = inputs + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * cols + column[:, None]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    share = tl.cdiv(tl.cdiv(cols, COLUMNS), SPLITS) * COLUMNS
    begin = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + share, cols), COLUMNS):
        if EVEN:
            code = tl.load(weights + first)
            vector = tl.load(vectors + first)
        else:
            code = tl.load(weights + first, mask=first + column[None, :] < cols, other=0)
            vector = tl.load(vectors + first, mask=first + column[:, None] < cols, other=0.0)
        if WIDENS:
            sums = tl.dot(code.to(tl.float32), vector.to(tl.float32), sums)
        else:
            sums = tl.dot(code.to(vector.dtype), vector, sums)
    inside = row < rows
    place = token.to(tl.int64)[None, :] * rows + row[:, None]
    if SPLITS == 1:
        value = sums * tl.load(scale + row, mask=inside, other=0.0)[:, None]
        if HAS_BIAS:
            value += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    else:
        value = sums
        out += tl.program_id(1).to(tl.int64) * tokens * rows
    tl.store(
        out + place,
        value.to(out.dtype.element_ty),
        mask=inside[:, None] & (token < tokens)[None, :],
    )


@triton.jit
def _sum_kernel(
    sums,
    scale,
    bias,
    out,
    tokens,
    rows,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1).to(tl.int64)
    inside = row < rows
    value = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        value += tl.load(sums + (split * tokens + token) * rows + row, mask=inside, other=0.0)
    value *= tl.load(scale + row, mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * rows + row, value.to(out.dtype.element_ty), mask=inside)
