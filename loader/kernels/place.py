"""Moves raw chunks into the arena of decoded symbols, and finds symbols that are not allowed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from codecllm.loader.kernels.on_device import on_device_of

_BLOCK = 4096


def place_chunks(
    stored: torch.Tensor, fields: torch.Tensor, largest: int, arena: torch.Tensor
) -> None:
    """Copies chunks: arena[place : place + size] = stored[slot : slot + size].

    Each byte is read and written once: 2 bytes a symbol over the memory bandwidth.

    Args:
        stored: uint8 [n], contiguous.
        fields: int64 [chunks, 3], contiguous, on the device: slot, place and size of each, inside
            `stored` and `arena`.
        largest: the largest size.
        arena: uint8 [m], contiguous.
    """
    if fields.shape[0]:
        with on_device_of(arena):
            _place_kernel[(fields.shape[0], triton.cdiv(largest, _BLOCK))](
                stored, fields, arena, BLOCK=_BLOCK
            )


def find_forbidden(
    arena: torch.Tensor, fields: torch.Tensor, largest: int, forbidden: int, flags: torch.Tensor
) -> None:
    """Sets flags[index] to 1 where one of the symbols arena[place : place + size] is `forbidden`.

    Each byte is read once.

    Args:
        arena: uint8 [m], contiguous.
        fields: int64 [chunks, 3], contiguous, on the device: place, size and index of each.
        largest: the largest size.
        forbidden: the symbol, 0 to 255.
        flags: int32 [k], contiguous; others are left as they are.
    """
    if fields.shape[0]:
        grid = (fields.shape[0], triton.cdiv(largest, _BLOCK))
        with on_device_of(arena):
            _forbidden_kernel[grid](arena, fields, flags, forbidden, BLOCK=_BLOCK)


@triton.jit
def _place_kernel(stored, fields, arena, BLOCK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    slot = tl.load(fields + chunk * 3)
    place = tl.load(fields + chunk * 3 + 1)
    size = tl.load(fields + chunk * 3 + 2)
    index = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if (slot | place | size) % 16 == 0:  # mostly: then 16 bytes move at once
        # New values, because a hint for the old ones would hold in the other branch, too.
        begin, target, inside = slot // 16 * 16, place // 16 * 16, index < size // 16 * 16
        tl.store(arena + target + index, tl.load(stored + begin + index, mask=inside), mask=inside)
    else:
        inside = index < size
        tl.store(arena + place + index, tl.load(stored + slot + index, mask=inside), mask=inside)


@triton.jit
def _forbidden_kernel(arena, fields, flags, forbidden, BLOCK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    place = tl.load(fields + chunk * 3)
    size = tl.load(fields + chunk * 3 + 1)
    flag = tl.load(fields + chunk * 3 + 2)
    index = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    symbols = tl.load(arena + place + index, mask=index < size, other=0).to(tl.int32)
    found = tl.max(((symbols == forbidden) & (index < size)).to(tl.int32), axis=0)
    tl.store(flags + flag, found, mask=found > 0)
