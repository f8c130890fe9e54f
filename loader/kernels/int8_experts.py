"""Products with experts' int8 weights on a GPU: each input with those of the experts it chose.

Inputs are gathered in blocks by their expert. How many blocks there are depends on the number of
inputs alone, and what was chosen is never read back: a CUDA graph can record it. Rounding is that
of `int8_linear`; inputs that have scales of columns are rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from codecllm.loader.kernels.expert_codes import ExpertCodes
from codecllm.loader.kernels.on_device import on_device_of

FEW = 32
"""Most choices of which each is a block of its own: to order them takes longer."""

_LEAST, _MOST = 16, 64
_WARPS = 4


@dataclass(frozen=True, slots=True)
class Blocks:
    """Choices, a token times an expert, in blocks of one expert each.

    Attributes:
        order: int64 [choices]: the choices in the order of their experts.
        expert: int64 [blocks]: number of the expert of a block; negative: the block is empty.
        start: int64 [blocks]: place of its first choice in `order`.
        stop: int64 [blocks]: place behind its last one.
        size: most choices of a block for which the kernel has room.
    """

    order: torch.Tensor
    expert: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    size: int


def block_size(choices: int, experts: int) -> int:
    """Returns the most choices of a block: a power of two about as large as an expert's share."""
    share = choices // max(1, experts)
    return min(max(1 << (share - 1).bit_length(), _LEAST), _MOST)


def _tile(size: int) -> tuple[int, int, int]:
    """Returns rows and columns of a step of the kernel, and its stages, for a size of blocks.

    Compiled, they take at most 65 KiB of shared memory on Hopper and 51 KiB on GPUs before it.
    """
    return (32, 256, 4) if size == _LEAST else (64, 128, 3)


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
        return Blocks(every[:-1], numbers, every[:-1], every[1:], _LEAST)
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
    return Blocks(order, torch.where(found < experts, expert, -1), start, stop, size)


def experts_mlp(
    inputs: torch.Tensor,
    numbers: torch.Tensor,
    shares: torch.Tensor,
    gate_up: ExpertCodes,
    down: ExpertCodes,
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
    blocks = make_blocks(numbers.reshape(-1), len(gate_up.codes))
    both = _products(inputs.contiguous(), gate_up, blocks, tokens * chosen)
    parts = _products(activate(both).contiguous(), down, blocks, tokens * chosen)
    each = parts.view(tokens, chosen, -1).to(torch.float32)
    return (each * shares[..., None]).sum(1).to(inputs.dtype)


def _products(
    inputs: torch.Tensor, matrix: ExpertCodes, blocks: Blocks, choices: int
) -> torch.Tensor:
    rows = matrix.codes.shape[1]
    # Choices of experts of other ranks add zeros.
    out = inputs.new_zeros(choices, rows)
    if matrix.col_scale is None:
        experts_linear(inputs, matrix.codes, matrix.scale, None, blocks, out)
        return out
    parts = matrix.col_scale.shape[1]
    for index in range(parts):
        part = slice(index * rows // parts, (index + 1) * rows // parts)
        experts_linear(
            inputs,
            matrix.codes[:, part],
            matrix.scale[:, part],
            matrix.col_scale[:, index],
            blocks,
            out[:, part],
        )
    return out


def experts_linear(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    col_scale: torch.Tensor | None,
    blocks: Blocks,
    out: torch.Tensor,
) -> None:
    """Multiplies the inputs of choices with the transposed weights of their experts.

    Args:
        inputs: bfloat16 or float16 [tokens, cols], contiguous: a token has as many choices, one
            behind the other, as there are choices for each token.
        codes: int8 [experts, rows, cols]; an expert's are contiguous.
        scale: float32 [experts, rows], an expert's contiguous.
        col_scale: float32 [experts, cols], an expert's contiguous, or None.
        blocks: the choices.
        out: [choices, rows] of the inputs' dtype, a choice's contiguous. Rows of choices without an
            expert are not written.
    """
    _, rows, cols = codes.shape
    tile_rows, tile_columns, stages = _tile(blocks.size)
    with on_device_of(inputs):
        _experts_kernel[(triton.cdiv(rows, tile_rows), len(blocks.expert))](
            inputs,
            codes,
            scale,
            scale if col_scale is None else col_scale,
            out,
            blocks.order,
            blocks.expert,
            blocks.start,
            blocks.stop,
            rows,
            cols,
            codes.stride(0),
            scale.stride(0),
            0 if col_scale is None else col_scale.stride(0),
            out.stride(0),
            len(blocks.order) // max(1, len(inputs)),
            HAS_COLUMNS=col_scale is not None,
            EVEN=cols % tile_columns == 0,
            WIDENS=inputs.device.type == "cpu",
            ROWS=tile_rows,
            TOKENS=blocks.size,
            COLUMNS=tile_columns,
            num_warps=_WARPS,
            num_stages=stages,
        )


@triton.jit
def _experts_kernel(
    inputs,
    codes,
    scale,
    col_scale,
    out,
    order,
    expert,
    start,
    stop,
    rows,
    cols,
    codes_stride,
    scale_stride,
    col_stride,
    out_stride,
    chosen,
    HAS_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDENS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    number = tl.load(expert + tl.program_id(1))
    last = tl.load(stop + tl.program_id(1))
    place = tl.load(start + tl.program_id(1)) + tl.arange(0, TOKENS)
    if number >= 0:
        choice = tl.load(order + tl.minimum(place, last - 1))
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        near = tl.minimum(row, rows - 1).to(tl.int64)
        weights = codes + number * codes_stride + near[:, None] * cols + column[None, :]
        vectors = inputs + (choice // chosen)[None, :] * cols + column[:, None]
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
                factor = tl.load(
                    col_scale + number * col_stride + first + column, mask=inside, other=0.0
                )
                vector = (vector.to(tl.float32) * factor[:, None]).to(vector.dtype)
            if WIDENS:
                sums = tl.dot(code.to(tl.float32), vector.to(tl.float32), sums)
            else:
                sums = tl.dot(code.to(vector.dtype), vector, sums)
        of_rows = tl.load(scale + number * scale_stride + row, mask=row < rows, other=0.0)
        value = sums * of_rows[:, None]
        tl.store(
            out + choice[None, :] * out_stride + row[:, None],
            value.to(out.dtype.element_ty),
            mask=(row < rows)[:, None] & (place < last)[None, :],
        )
