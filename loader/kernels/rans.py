"""Decodes `rans` chunks on a GPU: one warp a chunk, one lane for each lane of the code.

There are two kernels. The one in CUDA C, rans.cu, keeps a chunk's table and its next words in
shared memory and is the faster one; it is compiled when it is first needed. The one in Triton runs
on any GPU that Triton knows, and wherever the other cannot.

An attacker controls only the states and words of chunks: the host checks sizes and places and
parses tables, and the kernel compares every read with the number of words of its chunk. With any
bytes, a chunk takes one step for each 32 symbols and writes only its own bytes; an error is
reported in its fault word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from codecllm.formats.codecs.rans_reference import STATE_BYTES
from codecllm.formats.codecs.rans_table import FrequencyTable
from codecllm.formats.errors import DecodeError, UnsupportedEnvironmentError
from codecllm.loader.kernels.nvrtc import Kernel
from codecllm.loader.kernels.on_device import on_device_of

FAULT_NONE = 0
FAULT_STATE = 1
"""A state is smaller than 2^16 at the start."""
FAULT_WORDS = 2
"""Words are missing or left over."""
FAULT_END = 3
"""A lane does not end in its initial state."""

_FAULTS = {
    FAULT_STATE: "state of a lane is too small",
    FAULT_WORDS: "words of rans chunk are missing or left over",
    FAULT_END: "a lane of rans chunk does not end in its initial state",
}
_ALIGNMENT = 16
_SOURCE = Path(__file__).with_name("rans.cu")
_SHARED_BYTES = 4 * 256 + 4 * 64
"""Shared memory of rans.cu beside the symbols of the slots."""

DecodeKernel = Literal["auto", "cuda", "triton"]
"""Which kernel decodes: `auto` is `cuda` where that can be compiled, else `triton`."""

_FILL_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """Frequency tables in device memory, ready for decoding.

    Attributes:
        symbols: uint8 [tables, slots]: the symbol of each slot; slots is 2^p for the largest
            precision p among them.
        ranges: int32 [tables, 256]: per symbol frequency | start << 16.
        precisions: int32 [tables].
    """

    symbols: torch.Tensor
    ranges: torch.Tensor
    precisions: torch.Tensor


@dataclass(frozen=True, slots=True)
class RansChunks:
    """Which chunks to decode; every size and place was checked when it was made.

    Attributes:
        fields: int64 [chunks, 5], contiguous: where the slot begins in the stored bytes, its number
            of words, its number of symbols, where they go in the arena, the number of its table.
        stored_bytes: least size of the stored bytes.
        arena_bytes: least size of the arena.
        tables: least number of tables.
    """

    fields: torch.Tensor
    stored_bytes: int
    arena_bytes: int
    tables: int

    def to(self, device: torch.device) -> RansChunks:
        """Returns a copy on `device`; from pinned memory the copy is asynchronous."""
        return RansChunks(
            self.fields.to(device, non_blocking=True),
            self.stored_bytes,
            self.arena_bytes,
            self.tables,
        )


def describe_chunks(
    slots: NDArray[np.int64],
    stored_bytes: NDArray[np.int64],
    raw_bytes: NDArray[np.int64],
    places: NDArray[np.int64],
    tables: NDArray[np.int64],
) -> RansChunks:
    """Checks and gathers the facts of each chunk; all arguments int64 [chunks], on the host.

    Args:
        slots: where each chunk's slot begins in the stored bytes, multiples of 16.
        stored_bytes: stored bytes of each chunk, as its record says.
        raw_bytes: symbols of each chunk.
        places: where its symbols go in the arena.
        tables: number of its table.

    Raises:
        DecodeError: a chunk has a size that no encoder gives; `chunk` counts within the arguments.
        ValueError: a place is negative or not aligned: a mistake of the caller.
    """
    wrong = (stored_bytes < STATE_BYTES) | (stored_bytes % 2 != 0)
    if wrong.any():
        chunk = int(wrong.argmax())
        raise DecodeError(
            "rans chunk has an impossible size", chunk=chunk, got=int(stored_bytes[chunk])
        )
    fields = np.stack(
        [slots, (stored_bytes - STATE_BYTES) // 2, raw_bytes, places, tables], axis=1
    ).astype(np.int64)
    if fields.size and (fields.min() < 0 or (slots % _ALIGNMENT).any()):
        raise ValueError("a place is negative or not aligned")
    return RansChunks(
        torch.from_numpy(np.ascontiguousarray(fields)),
        int((slots + stored_bytes).max(initial=0)),
        int((places + raw_bytes).max(initial=0)),
        int(tables.max(initial=-1)) + 1,
    )


def expand_tables(tables: Sequence[FrequencyTable], device: torch.device) -> DeviceTables:
    """Copies parsed tables to a device, 1 KiB each, and expands them there to 4 to 16 KiB."""
    frequencies = np.array([table.frequencies for table in tables], np.int64).reshape(
        len(tables), 256
    )
    return expand_frequencies(
        np.array([table.precision for table in tables], np.int64), frequencies, device
    )


def expand_frequencies(
    precisions: NDArray[np.int64], frequencies: NDArray[np.int64], device: torch.device
) -> DeviceTables:
    """As `expand_tables`, from the result of `parse_tables`."""
    slots = 1 << int(precisions.max(initial=0))
    ranges = frequencies | np.cumsum(frequencies, axis=1) - frequencies << 16
    on_device = torch.from_numpy(ranges.astype(np.int32)).to(device)
    symbols = torch.zeros(len(ranges), slots, dtype=torch.uint8, device=device)
    if len(ranges):
        with on_device_of(symbols):
            _fill_kernel[(len(ranges), 256)](on_device, symbols, slots, BLOCK=_FILL_BLOCK)
    return DeviceTables(
        symbols, on_device, torch.from_numpy(precisions.astype(np.int32)).to(device)
    )


def decode_rans(
    stored: torch.Tensor,
    chunks: RansChunks,
    tables: DeviceTables,
    arena: torch.Tensor,
    faults: torch.Tensor,
    kernel: DecodeKernel = "auto",
) -> None:
    """Decodes chunks into the arena: the bits of `formats.codecs.rans_reference.decode`.

    Nothing is synchronized. Symbols of a chunk whose fault word is not FAULT_NONE must not be used.

    In a step a warp looks up a byte of `tables.symbols` and a word of `tables.ranges` per lane,
    reads the next few of the chunk's words and writes 32 bytes in a row. From device memory each
    symbol takes its stored bits and one byte written: the floor is (1 + bits / 8) bytes a symbol
    over the memory bandwidth. The other floors are instructions, of which an SM issues four a cycle
    (compiled for sm_90 a step has about 27 in CUDA C, 38 in Triton), and, for few chunks, that each
    step waits for the one before it.

    Args:
        stored: uint8 [n], n a multiple of 4, on the device, 16-byte aligned: slots as they lie in
            payloads.
        chunks: the chunks, on the device.
        tables: their tables.
        arena: uint8 [m], on the device; receives each chunk's symbols.
        faults: int32 [chunks], on the device; receives a fault word per chunk.
        kernel: which one decodes.

    Raises:
        UnsupportedEnvironmentError: `kernel` is `cuda` and cannot be compiled here.
        ValueError: a tensor is smaller than `chunks` says, or not contiguous: a mistake of the
            caller.
    """
    count = chunks.fields.shape[0]
    enough = (
        stored.numel() >= chunks.stored_bytes
        and arena.numel() >= chunks.arena_bytes
        and tables.precisions.numel() >= chunks.tables
        and faults.numel() >= count
    )
    if not enough or not all(
        tensor.is_contiguous() for tensor in (stored, arena, faults, chunks.fields)
    ):
        raise ValueError("a tensor is too small for these chunks or not contiguous")
    if not count:
        return
    slots = tables.symbols.shape[1]
    compiled = None if kernel == "triton" else cuda_kernel(stored.device)
    if isinstance(compiled, Kernel):
        given = (
            stored,
            chunks.fields,
            tables.symbols,
            tables.ranges,
            tables.precisions,
            arena,
            faults,
            slots,
        )
        compiled.launch(count, 32, slots + _SHARED_BYTES, given)
    elif kernel == "cuda":
        raise UnsupportedEnvironmentError(f"the kernel in CUDA C cannot be used: {compiled}")
    else:
        words = (stored.view(torch.int32), stored.view(torch.int16))
        with on_device_of(arena):
            _decode_kernel[(count,)](
                *words,
                chunks.fields,
                tables.symbols,
                tables.ranges,
                tables.precisions,
                arena,
                faults,
                slots,
                num_warps=1,
            )


@cache
def cuda_kernel(device: torch.device) -> Kernel | str:
    """Returns the kernel in CUDA C, compiled for a device, or why there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is no CUDA device"
    try:
        return Kernel(_SOURCE.read_text(), "decode_rans", device)
    except UnsupportedEnvironmentError as exc:
        return str(exc)


def fault_error(fault: int) -> DecodeError:
    """Returns the error for a fault word other than FAULT_NONE."""
    return DecodeError(_FAULTS.get(fault, f"unknown fault {fault} of rans decoder"))


@triton.jit
def _fill_kernel(ranges, symbols, slots, BLOCK: tl.constexpr):
    table = tl.program_id(0)
    symbol = tl.program_id(1)
    packed = tl.load(ranges + table * 256 + symbol)
    start = packed >> 16
    end = start + (packed & 0xFFFF)
    for first in range(start, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        place = table.to(tl.int64) * slots + slot
        tl.store(
            symbols + place,
            (symbol + tl.zeros_like(slot)).to(tl.uint8),
            mask=(slot < end) & (slot < slots),
        )


@triton.jit
def _step(states, symbols, ranges, precision):
    """Decodes one symbol in every lane; returns symbols uint8 [32] and states uint32 [32]."""
    slot = states & ((1 << precision) - 1).to(tl.uint32)
    symbol = tl.load(symbols + slot)
    packed = tl.load(ranges + symbol).to(tl.uint32, bitcast=True)
    states = (packed & 0xFFFF) * (states >> precision.to(tl.uint32)) + slot - (packed >> 16)
    return symbol, states


@triton.jit
def _ones(bits):
    """Counts the set bits of each uint32; compilers turn this form into one instruction."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return (bits * 0x01010101) >> 24


@triton.jit
def _refill(states, position, needs, words, count, lane):
    """Gives the lanes that need a word the next ones, in order; returns states and words read.

    The lanes' needs, one bit each, are added up: a vote. Below a lane's own bit stand those that
    come before it.
    """
    own = tl.full((32,), 1, tl.uint32) << lane.to(tl.uint32)
    vote = tl.sum(tl.where(needs, own, 0).to(tl.uint32), axis=0)
    place = position + _ones(vote & (own - 1)).to(tl.int32)
    word = tl.load(words + place, mask=needs & (place < count), other=0).to(tl.uint32) & 0xFFFF
    return tl.where(needs, (states << 16) | word, states), position + _ones(vote).to(tl.int32)


@triton.jit
def _decode_kernel(as_int32, as_int16, fields, symbols, ranges, precisions, arena, faults, slots):
    chunk = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    begin = tl.multiple_of(tl.load(fields + chunk * 5), 16)
    count = tl.load(fields + chunk * 5 + 1).to(tl.int32)
    length = tl.load(fields + chunk * 5 + 2).to(tl.int32)
    out = arena + tl.load(fields + chunk * 5 + 3)
    table = tl.load(fields + chunk * 5 + 4)
    symbols += table * slots
    ranges += table * 256
    precision = tl.load(precisions + table)
    words = as_int16 + (begin // 2 + 64)
    states = tl.load(as_int32 + begin // 4 + lane).to(tl.uint32, bitcast=True)
    small = tl.max((states < 65536).to(tl.int32), axis=0)
    position = 0
    whole = length // 32 * 32
    for index in range(0, whole, 32):
        symbol, states = _step(states, symbols, ranges, precision)
        tl.store(out + index + lane, symbol)
        states, position = _refill(states, position, states < 65536, words, count, lane)
    active = whole + lane < length
    symbol, following = _step(states, symbols, ranges, precision)
    tl.store(out + whole + lane, symbol, mask=active)
    following, position = _refill(
        following, position, active & (following < 65536), words, count, lane
    )
    states = tl.where(active, following, states)
    open_lanes = tl.max((states != 65536).to(tl.int32), axis=0)
    fault = tl.where(small > 0, 1, tl.where(position != count, 2, tl.where(open_lanes > 0, 3, 0)))
    tl.store(faults + chunk, fault)
