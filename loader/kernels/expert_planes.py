"""Unpacks the planes of chosen experts into codes of 8 bits, on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from codecllm.loader.kernels.expert_codes import (
    ENTRY_ROWS,
    ExpertCodes,
    ExpertPlanes,
    unit_of,
    widths_of,
)
from codecllm.loader.kernels.on_device import on_device_of

_TAKEN = 256
"""Exceptions that a step of the kernel writes."""

_MOST_PLANES = 3


def unpack(matrix: ExpertPlanes, numbers: torch.Tensor) -> ExpertCodes:
    """Returns the codes of some experts.

    Args:
        matrix: the planes of all experts.
        numbers: int64 [slots] on their device: the expert of each slot; negative: none, whose codes
            are left as they are in memory.

    Returns:
        Codes [slots, rows, cols]; scales and wide codes are those of all experts, by their number.
    """
    rows, cols = matrix.scale.shape[1], matrix.cols
    codes = torch.empty(len(numbers), rows, cols, dtype=torch.int8, device=numbers.device)
    words = [plane.view(torch.int32) for plane in matrix.planes]
    words = [*words, *words[:1] * _MOST_PLANES][:_MOST_PLANES]
    near, unit = matrix.near, unit_of(cols)
    part_rows = rows // matrix.parts
    with on_device_of(numbers):
        _unpack_kernel[(triton.cdiv(part_rows, ENTRY_ROWS), matrix.parts, len(numbers))](
            *words,
            numbers if near is None else near.bounds,
            numbers if near is None else near.places,
            numbers if near is None else near.values,
            codes,
            codes.view(torch.int32),
            numbers,
            part_rows,
            cols,
            cols // unit,
            BITS=matrix.bits,
            LOW=widths_of(matrix.bits)[0],
            UNIT=unit,
            HAS_NEAR=near is not None,
            ROWS=ENTRY_ROWS,
            TAKEN=_TAKEN,
        )
    return ExpertCodes(codes, matrix.scale, matrix.col_scale, matrix.wide)


@triton.jit
def _unpack_kernel(
    plane0,
    plane1,
    plane2,
    bounds,
    places,
    values,
    codes,
    out,
    numbers,
    rows,
    cols,
    units,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_NEAR: tl.constexpr,
    ROWS: tl.constexpr,
    TAKEN: tl.constexpr,
):
    # A word of 32 bits holds four fields of a plane, or four codes, one in each byte.
    words: tl.constexpr = UNIT // 4
    middle: tl.constexpr = 2 if BITS - LOW >= 2 else BITS - LOW
    high: tl.constexpr = BITS - LOW - middle
    slot = tl.program_id(2).to(tl.int64)
    number = tl.load(numbers + slot)
    if number >= 0:
        part = tl.program_id(1)
        parts = tl.num_programs(1)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None]
        word = tl.arange(0, words)
        place = ((number * parts + part) * rows + row) * units
        target = (
            out + (((slot * parts + part) * rows + row) * units * words)[:, None] + word[None, :]
        )
        for unit in range(0, units):
            code = _fields(plane0, place + unit, word, mask, LOW, UNIT)
            if middle > 0:
                code |= _fields(plane1, place + unit, word, mask, middle, UNIT) << LOW
            if high > 0:
                code |= _fields(plane2, place + unit, word, mask, high, UNIT) << (LOW + middle)
            # Each byte is code + 2^(BITS - 1); nothing is carried from one to the next.
            code += (128 - (1 << (BITS - 1))) * 0x01010101
            tl.store(target + unit * words, code ^ -0x7F7F7F80, mask)
        if HAS_NEAR:
            tl.debug_barrier()  # the entries go over what other threads of this block have stored
            tiles = tl.cdiv(rows, ROWS)
            own = bounds + (number * parts + part) * (tiles + 1) + tl.program_id(0)
            end = tl.load(own + 1)
            first = codes + (slot * parts + part) * rows * cols
            for begin in range(tl.load(own), end, TAKEN):
                entry = begin + tl.arange(0, TAKEN)
                where = tl.load(places + entry, mask=entry < end, other=0)
                value = tl.load(values + entry, mask=entry < end, other=0)
                at = ((where >> 16) & 0xFFFF).to(tl.int64) * cols + (where & 0xFFFF)
                tl.store(first + at, value.to(tl.int8), mask=entry < end)


@triton.jit
def _fields(plane, units, word, mask, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Returns fields of a plane, four in a word."""
    size: tl.constexpr = UNIT * WIDTH // 32
    value = tl.load(plane + (units * size)[:, None] + (word % size)[None, :], mask=mask, other=0)
    if WIDTH < 8:
        value = (value >> (word // size * WIDTH)[None, :]) & ((1 << WIDTH) - 1) * 0x01010101
    return value
