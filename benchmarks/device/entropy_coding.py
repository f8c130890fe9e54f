"""How fast `rans` chunks decode, by entropy, size of chunks and of batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.device.machine import Machine, Row
from codecllm.formats.codecs import CODEC_IDS, CODECS, rans
from codecllm.formats.codecs.entropy import entropy_bits
from codecllm.formats.codecs.rans_fit import fit_table
from codecllm.formats.shards.chunk_table import slot_bytes
from codecllm.loader.device.nvcomp import Nvcomp, ZstdFrames, open_nvcomp
from codecllm.loader.kernels.rans import (
    DecodeKernel,
    cuda_kernel,
    decode_rans,
    describe_chunks,
    expand_tables,
)

CHUNKS_KIB = (16, 32, 64, 128, 256)
GROUP_SYMBOLS = 1 << 20


@dataclass(frozen=True, slots=True)
class Coded:
    """Chunks with codec `rans`, as they lie in a payload.

    Attributes:
        symbols: uint8 [n], the decoded symbols.
        payload: uint8, slots.
        slots, sizes, raw, tables_of: int64 [chunks].
        tables: of the groups.
        bits: entropy of a symbol, averaged over groups.
    """

    symbols: NDArray[np.uint8]
    payload: NDArray[np.uint8]
    slots: NDArray[np.int64]
    sizes: NDArray[np.int64]
    raw: NDArray[np.int64]
    tables_of: NDArray[np.int64]
    tables: list
    bits: float


def gaussian_symbols(sigma: float, count: int) -> NDArray[np.uint8]:
    """Returns int8 codes of N(0, sigma) as symbols, uint8 [count]."""
    values = np.random.default_rng(round(100 * sigma)).standard_normal(count, dtype=np.float32)
    return np.clip(np.rint(values * np.float32(sigma)), -127, 127).astype(np.int8).view(np.uint8)


def exponent_symbols(count: int) -> NDArray[np.uint8]:
    """Returns the exponents of Gaussian bf16 weights, uint8 [count]."""
    values = np.random.default_rng(7).standard_normal(count, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 23).astype(np.uint8)


def encode(symbols: NDArray[np.uint8], chunk: int) -> Coded:
    """Codes symbols in chunks, about a million symbols to a table."""
    per_group = max(1, GROUP_SYMBOLS // chunk)
    parts = [symbols[start : start + chunk] for start in range(0, len(symbols), chunk)]
    groups = [
        symbols[start : start + per_group * chunk]
        for start in range(0, len(symbols), per_group * chunk)
    ]
    tables = [fit_table(np.bincount(group, minlength=256)) for group in groups]
    payloads = rans.encode_chunks(
        [rans.Uncoded(part, tables[number // per_group]) for number, part in enumerate(parts)]
    )
    sizes = np.array([len(data) for data in payloads], np.int64)
    spans = np.array([slot_bytes(len(data)) for data in payloads], np.int64)
    slots = np.cumsum(spans) - spans
    payload = np.zeros(int(spans.sum()), np.uint8)
    for slot, data in zip(slots, payloads, strict=True):
        payload[slot : slot + len(data)] = np.frombuffer(data, np.uint8)
    raw = np.array([len(part) for part in parts], np.int64)
    tables_of = np.arange(len(parts), dtype=np.int64) // per_group
    bits = sum(entropy_bits(group) for group in groups) / len(symbols)
    return Coded(symbols, payload, slots, sizes, raw, tables_of, tables, bits)


def decode_copies(
    machine: Machine, coded: Coded, copies: int, kernel: DecodeKernel = "auto"
) -> tuple[float, bool]:
    """Decodes `copies` copies of the chunks, each at its own place in device memory.

    Returns:
        GB of symbols a second, and whether all of them came back.
    """
    shift = np.arange(copies, dtype=np.int64)[:, None]
    slots = (coded.slots[None] + shift * len(coded.payload)).reshape(-1)
    places = (np.cumsum(coded.raw) - coded.raw)[None] + shift * len(coded.symbols)
    again = [np.tile(values, copies) for values in (coded.sizes, coded.raw, coded.tables_of)]
    chunks = describe_chunks(slots, again[0], again[1], places.reshape(-1), again[2]).to(
        machine.device
    )
    device_payload = torch.from_numpy(coded.payload).to(machine.device).repeat(copies)
    tables = expand_tables(coded.tables, machine.device)
    arena = torch.full((copies, len(coded.symbols)), 0xA5, dtype=torch.uint8, device=machine.device)
    faults = torch.full((len(slots),), -1, dtype=torch.int32, device=machine.device)
    seconds = machine.seconds(
        [lambda: decode_rans(device_payload, chunks, tables, arena.view(-1), faults, kernel)]
    )
    expected = torch.from_numpy(coded.symbols).to(machine.device)
    return arena.numel() / seconds / 1e9, bool((arena == expected).all()) and not bool(faults.any())


def decoders(machine: Machine) -> Iterator[Row]:
    """Measures each kind of symbols at each size of chunks, then one kind in batches of each size.

    Payloads of the host are decoded many times over, from copies at different places: coding
    as much as a GPU decodes in a measurable time would take numpy a minute each.
    """
    unique = machine.size(8 << 20, 1 << 10)
    total = machine.size(1 << 30, 1 << 11)
    kinds = {
        "int8": gaussian_symbols(33.0, unique),
        "int8 at 4 bits": gaussian_symbols(4.0, unique),
        "bf16 exponents": exponent_symbols(unique),
    }
    without = cuda_kernel(machine.device)
    kernels: list[DecodeKernel] = ["triton"] if isinstance(without, str) else ["cuda", "triton"]
    if isinstance(without, str) and not machine.rehearses:
        yield Row("rans in CUDA C", False, note=without)
    sizes = CHUNKS_KIB if not machine.small else (1,)
    for name, symbols in kinds.items():
        for kib in sizes:
            int8_chunks = encode(symbols, kib << 10)
            for kernel in kernels:
                rate, sound = decode_copies(machine, int8_chunks, total // unique, kernel)
                note = f"{int8_chunks.bits:.2f} bits, {'same bits' if sound else 'WRONG BITS'}"
                numbers = {"sound": sound, "bits": int8_chunks.bits}
                yield Row(f"rans, {name}, {kib} KiB chunks, {kernel}", rate, "GB/s", note, numbers)
    int8_chunks = encode(kinds["int8"], sizes[len(sizes) // 2] << 10)
    for mib in (8, 32, 128, 256) if not machine.small else ():
        for kernel in kernels:
            rate, sound = decode_copies(machine, int8_chunks, max(1, (mib << 20) // unique), kernel)
            verdict = "same bits" if sound else "WRONG BITS"
            note = f"{len(int8_chunks.raw) * mib // 8} chunks, {verdict}"
            yield Row(
                f"rans, int8, {mib} MiB at once, {kernel}", rate, "GB/s", note, {"sound": sound}
            )


def zstd_decoders(machine: Machine) -> Iterator[Row]:
    """Measures nvCOMP with frames of containers, at each size of chunks and of batches."""
    if machine.rehearses:
        return
    library = open_nvcomp(machine.device)
    unique = 8 << 20
    kinds = {"int8": gaussian_symbols(33.0, unique), "bf16 exponents": exponent_symbols(unique)}
    for name, symbols in kinds.items():
        for kib in CHUNKS_KIB:
            for mib in (512,) if kib != 64 else (32, 128, 512, 1024):
                yield _nvcomp_row(machine, library, name, symbols, kib, mib)


def _nvcomp_row(
    machine: Machine, library: Nvcomp, name: str, symbols: NDArray[np.uint8], kib: int, mib: int
) -> Row:
    copies = (mib << 20) // len(symbols)
    parts = [symbols[start : start + (kib << 10)] for start in range(0, len(symbols), kib << 10)]
    frames = [CODECS[CODEC_IDS["zstd"]].encode(part) for part in parts]
    spans = np.array([slot_bytes(len(frame)) for frame in frames], np.int64)
    payload = b"".join(
        bytes(frame).ljust(int(span), b"\0") for frame, span in zip(frames, spans, strict=True)
    )
    stored = (
        torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(machine.device).repeat(copies)
    )
    arena = torch.full((copies, len(symbols)), 0xA5, dtype=torch.uint8, device=machine.device)
    shift = np.arange(copies, dtype=np.int64)[:, None]
    raw = np.array([len(part) for part in parts], np.int64)
    words = np.stack(
        [
            (stored.data_ptr() + (np.cumsum(spans) - spans)[None] + shift * len(payload)).reshape(
                -1
            ),
            np.tile(np.array([len(frame) for frame in frames], np.int64), copies),
            np.tile(raw, copies),
            (arena.data_ptr() + (np.cumsum(raw) - raw)[None] + shift * len(symbols)).reshape(-1),
        ]
    )
    device_words = torch.from_numpy(words).to(machine.device)
    count = words.shape[1]
    places = [device_words.data_ptr() + 8 * count * number for number in range(4)]
    batch = ZstdFrames(*places, count, int(raw.max()), arena.numel())
    temp = torch.empty(
        library.temp_bytes(count, int(raw.max()), arena.numel()),
        dtype=torch.uint8,
        device=machine.device,
    )
    sizes = torch.zeros(count, dtype=torch.int64, device=machine.device)
    statuses = torch.full((count,), -1, dtype=torch.int32, device=machine.device)
    stream = torch.cuda.current_stream().cuda_stream
    work = partial(library.decode, batch, temp, sizes.data_ptr(), statuses.data_ptr(), stream)
    seconds = machine.seconds([work], graph=False)
    sound = not bool(statuses.any()) and bool(
        (arena == torch.from_numpy(symbols).to(machine.device)).all()
    )
    bits = 8 * len(payload) / len(symbols)
    verdict = "same bits" if sound else "WRONG BITS"
    note = f"{bits:.2f} bits stored, {count} chunks, temp {temp.numel() >> 20} MiB, {verdict}"
    return Row(
        f"nvCOMP zstd, {name}, {kib} KiB chunks, {mib} MiB at once",
        arena.numel() / seconds / 1e9,
        "GB/s",
        note,
    )
