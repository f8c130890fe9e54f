"""Products with experts' coded weights on a GPU: each input with those of the experts it chose.

Inputs are gathered in blocks by their expert. How many blocks there are depends on the number of
inputs alone, and what was chosen is never read back: a CUDA graph can record it. Rounding is that
of `int8_linear`; inputs that have scales of columns are rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from codecllm.loader.kernels.expert_codes import ENTRY_ROWS, ExpertCodes, ExpertPlanes
from codecllm.loader.kernels.expert_planes import unpack
from codecllm.loader.kernels.on_device import on_device_of

FEW = 32
"""Most choices of which each is a block of its own: to order them takes longer."""

_LEAST, _MOST = 16, 64
_WARPS = 4
_TAKEN = 64
"""Codes beyond 8 bits that a step of the kernel adds."""

SCRATCH_BYTES = 256 << 20
"""Most bytes of codes that are unpacked at once, beside those of one expert."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Choices, a token times an expert, in blocks of one expert each.

    Attributes:
        order: int64 [choices]: the choices in the order of their experts.
        expert: int64 [blocks]: number of the expert of a block; negative: the block is empty.
        start: int64 [blocks]: place of its first choice in `order`.
        stop: int64 [blocks]: place behind its last one.
        size: most choices of a block for which the kernel has room.
        slot: int64 [blocks]: place of the expert's codes.
        each_alone: whether each choice is a block of its own.
    """

    order: torch.Tensor
    expert: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    size: int
    slot: torch.Tensor
    each_alone: bool = False


def block_size(choices: int, experts: int) -> int:
    """Returns the most choices of a block: a power of two about as large as an expert's share."""
    share = choices // max(1, experts)
    return min(max(1 << (share - 1).bit_length(), _LEAST), _MOST)


def _tile(size: int) -> tuple[int, int, int]:
    """Returns rows and columns of a step of the kernel, and its stages, for a size of blocks.

    Compiled, they take at most 81 KiB of shared memory on Hopper and 65 KiB on GPUs before it.
    """
    return (64, 128, 4) if size == _LEAST else (128, 128, 3)


def make_blocks(numbers: torch.Tensor, experts: int) -> Blocks:
    """Returns blocks of choices.

    Args:
        numbers: integers [choices]: the expert of each one, below `experts`; negative: none here.
        experts: their number.
    """
    numbers, device = numbers.to(torch.int64), numbers.device
    choices = len(numbers)
    every = torch.arange(choices + 1, device=device)
    if choices <= FEW:
        return Blocks(every[:-1], numbers, every[:-1], every[1:], _LEAST, numbers, each_alone=True)
    size = block_size(choices, experts)
    ordered, order = numbers.sort()
    bounds = torch.searchsorted(ordered, torch.arange(experts + 1, device=device))
    counts = (bounds.diff() + size - 1) // size
    ends = counts.cumsum(0)
    block = torch.arange(min(choices, experts) + choices // size, device=device)
    found = torch.searchsorted(ends, block, right=True)
    expert = found.clamp(max=experts - 1)
    start = bounds[expert] + (block - ends[expert] + counts[expert]) * size
    stop = torch.minimum(start + size, bounds[expert + 1])
    expert = torch.where(found < experts, expert, -1)
    return Blocks(order, expert, start, stop, size, expert)


def experts_mlp(
    inputs: torch.Tensor,
    numbers: torch.Tensor,
    shares: torch.Tensor,
    gate_up: ExpertCodes | ExpertPlanes,
    down: ExpertCodes | ExpertPlanes,
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Returns the weighted sums of `down(activate([gate, up]))` of the experts of each token.

    Args:
        inputs: bfloat16 or float16 [tokens, hidden].
        numbers: integers [tokens, chosen]: see `make_blocks`.
        shares: float [tokens, chosen]: the weights of the sums.
        gate_up: rows of the gate and, behind them, of up.
        down: the third matrix.
        activate: [choices, 2 * inner] -> [choices, inner].

    Returns:
        [tokens, hidden], dtype of the inputs.
    """
    tokens, chosen = numbers.shape
    blocks = make_blocks(numbers.reshape(-1), len(gate_up.scale))
    both = _products(inputs.contiguous(), gate_up, blocks, tokens * chosen)
    parts = _products(activate(both).contiguous(), down, blocks, tokens * chosen)
    each = parts.view(tokens, chosen, -1).to(torch.float32)
    return (each * shares[..., None]).sum(1).to(inputs.dtype)


def _products(
    inputs: torch.Tensor, matrix: ExpertCodes | ExpertPlanes, blocks: Blocks, choices: int
) -> torch.Tensor:
    rows = matrix.scale.shape[1]
    # Choices of experts of other ranks add zeros.
    out = inputs.new_zeros(choices, rows)
    for codes, own_blocks in _unpacked(matrix, blocks):
        for index in range(matrix.parts):
            place = slice(index * rows // matrix.parts, (index + 1) * rows // matrix.parts)
            experts_linear(inputs, codes.part(index), own_blocks, out[:, place])
    return out


def _unpacked(
    matrix: ExpertCodes | ExpertPlanes, blocks: Blocks
) -> Iterator[tuple[ExpertCodes, Blocks]]:
    """Gives codes of 8 bits, and the blocks that multiply with them.

    Planes are unpacked: for a few choices the expert of each, else all experts that were chosen, as
    many at a time as `SCRATCH_BYTES` hold.
    """
    if isinstance(matrix, ExpertCodes):
        yield matrix, blocks
        return
    experts, rows = matrix.scale.shape
    choices = len(blocks.expert)
    if blocks.each_alone and choices < experts:
        slots = torch.arange(choices, device=blocks.expert.device)
        yield unpack(matrix, blocks.expert), replace(blocks, slot=slots)
        return
    has_choices = torch.zeros(experts + 1, dtype=torch.bool, device=blocks.expert.device)
    has_choices.index_fill_(0, blocks.expert, True)  # none of an expert is -1, the last one here
    step = max(1, SCRATCH_BYTES // (rows * matrix.cols))
    for first in range(0, experts, step):
        number = torch.arange(first, min(first + step, experts), device=has_choices.device)
        slot = blocks.expert - first
        inside = (slot >= 0) & (slot < len(number))
        own_blocks = replace(blocks, expert=torch.where(inside, blocks.expert, -1), slot=slot)
        yield unpack(matrix, torch.where(has_choices[number], number, -1)), own_blocks


def experts_linear(
    inputs: torch.Tensor, matrix: ExpertCodes, blocks: Blocks, out: torch.Tensor
) -> None:
    """Multiplies the inputs of choices with the transposed weights of their experts.

    Args:
        inputs: bfloat16 or float16 [tokens, cols], contiguous: a token has as many choices, one
            behind the other, as there are choices for each token.
        matrix: one part.
        blocks: the choices.
        out: [choices, rows] of the inputs' dtype, a choice's contiguous. Rows of choices without an
            expert are not written.
    """
    _, rows, cols = matrix.codes.shape
    tile_rows, tile_columns, stages = _tile(blocks.size)
    columns, wide = matrix.col_scale, matrix.wide
    with on_device_of(inputs):
        _experts_kernel[(triton.cdiv(rows, tile_rows), len(blocks.expert))](
            inputs,
            matrix.codes,
            matrix.scale,
            matrix.scale if columns is None else columns,
            matrix.scale if wide is None else wide.bounds,
            matrix.scale if wide is None else wide.places,
            matrix.scale if wide is None else wide.values,
            out,
            blocks.order,
            blocks.expert,
            blocks.slot,
            blocks.start,
            blocks.stop,
            rows,
            cols,
            matrix.codes.stride(0),
            matrix.scale.stride(0),
            0 if columns is None else columns.stride(0),
            0 if wide is None else wide.bounds.stride(0),
            out.stride(0),
            len(blocks.order) // max(1, len(inputs)),
            HAS_COLUMNS=columns is not None,
            HAS_WIDE=wide is not None,
            EVEN=cols % tile_columns == 0,
            WIDENS=inputs.device.type == "cpu",
            ROWS=tile_rows,
            TOKENS=blocks.size,
            COLUMNS=tile_columns,
            ENTRY_ROWS=ENTRY_ROWS,
            TAKEN=_TAKEN,
            num_warps=_WARPS,
            num_stages=stages,
        )


@triton.jit
def _experts_kernel(
    inputs,
    codes,
    scale,
    col_scale,
    bounds,
    places,
    values,
    out,
    order,
    expert,
    slot,
    start,
    stop,
    rows,
    cols,
    codes_stride,
    scale_stride,
    col_stride,
    bounds_stride,
    out_stride,
    chosen,
    HAS_COLUMNS: tl.constexpr,
    HAS_WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    WIDENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRY_ROWS: tl.constexpr,
    TAKEN: tl.constexpr,
):
    number = tl.load(expert + tl.program_id(1))
    last = tl.load(stop + tl.program_id(1))
    place = tl.load(start + tl.program_id(1)) + tl.arange(0, TOKENS)
    if number >= 0:
        choice = tl.load(order + tl.minimum(place, last - 1))
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        near = tl.minimum(row, rows - 1).to(tl.int64)
        base = tl.load(slot + tl.program_id(1)) * codes_stride
        weights = codes + base + near[:, None] * cols + column[None, :]
        of_choice = inputs + (choice // chosen)[None, :] * cols
        vectors = of_choice + column[:, None]
        factors = col_scale + number * col_stride
        sums = tl.zeros((ROWS, TOKENS), tl.float32)
        for first in range(0, cols, COLUMNS):
            inside = first + column < cols
            if EVEN:
                code = tl.load(weights + first)
                vector = tl.load(vectors + first)
            else:
                code = tl.load(weights + first, mask=inside[None, :], other=0)
                vector = tl.load(vectors + first, mask=inside[:, None], other=0.0)
            if HAS_COLUMNS:
                factor = tl.load(factors + first + column, mask=inside, other=0.0)
                vector = (vector.to(tl.float32) * factor[:, None]).to(vector.dtype)
            sums = _add_products(sums, code, vector, WIDENS)
        if HAS_WIDE:
            own = bounds + number * bounds_stride + tl.program_id(0) * (ROWS // ENTRY_ROWS)
            left = tl.cdiv(rows, ENTRY_ROWS) - tl.program_id(0) * (ROWS // ENTRY_ROWS)
            end = tl.load(own + tl.minimum(ROWS // ENTRY_ROWS, left))
            for begin in range(tl.load(own), end, TAKEN):
                entry = begin + tl.arange(0, TAKEN)
                where = tl.load(places + entry, mask=entry < end, other=0)
                value = tl.load(values + entry, mask=entry < end, other=0)
                mine = ((where >> 16) & 0xFFFF)[None, :] == row[:, None]
                at = where & 0xFFFF
                vector = tl.load(of_choice + at[:, None], mask=(entry < end)[:, None], other=0.0)
                if HAS_COLUMNS:
                    factor = tl.load(factors + at, mask=entry < end, other=0.0)
                    vector = (vector.to(tl.float32) * factor[:, None]).to(vector.dtype)
                sums = _add_products(sums, tl.where(mine, value[None, :], 0), vector, WIDENS)
        of_rows = tl.load(scale + number * scale_stride + row, mask=row < rows, other=0.0)
        result = sums * of_rows[:, None]
        tl.store(
            out + choice[None, :] * out_stride + row[:, None],
            result.to(out.dtype.element_ty),
            mask=(row < rows)[:, None] & (place < last)[None, :],
        )


@triton.jit
def _add_products(sums, code, vector, WIDENS: tl.constexpr):
    if WIDENS:
        return tl.dot(code.to(tl.float32), vector.to(tl.float32), sums)
    return tl.dot(code.to(vector.dtype), vector, sums)
