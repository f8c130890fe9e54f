"""Both rans kernels give the bits of the reference; chunks are short for the interpreter.

Without a GPU the kernel in CUDA C runs on the CPU, 32 coroutines acting as a warp.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codecllm.formats.codecs import rans, rans_reference
from codecllm.formats.codecs.rans_fit import fit_table
from codecllm.formats.codecs.rans_table import FrequencyTable
from codecllm.formats.errors import DecodeError, UnsupportedEnvironmentError
from codecllm.loader.kernels import rans as kernels
from codecllm.loader.kernels.rans import (
    FAULT_END,
    FAULT_NONE,
    FAULT_STATE,
    FAULT_WORDS,
    decode_rans,
    describe_chunks,
    expand_tables,
    fault_error,
)
from tests.loader.emulation import emulated_kernel

pytestmark = pytest.mark.gpu_too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GARBAGE = 0xA5
CHOSEN = {"kernel": "triton"}


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def kernel(request, monkeypatch):
    """Which kernel decodes."""
    monkeypatch.setitem(CHOSEN, "kernel", request.param)
    if request.param == "cuda" and DEVICE.type == "cpu":
        compiled = emulated_kernel()
        monkeypatch.setattr(kernels, "cuda_kernel", lambda device: compiled)
    return request.param


def _symbols(length, sigma, seed=0):
    codes = np.random.default_rng(seed).normal(0, sigma, length).round().clip(-127, 127)
    return codes.astype(np.int8).view(np.uint8)


def _decode(stored, raw_bytes, places_of, tables):
    """Decodes chunks that lie in slots with garbage between them; returns their symbols and faults.

    Every byte of the arena outside the chunks has to stay as it was.
    """
    rng = np.random.default_rng(9)
    payload, slots = bytearray(rng.bytes(32)), []
    for data in stored:
        slots.append(len(payload))
        payload += bytes(data).ljust(-(-len(data) // 16) * 16, b"\0") + rng.bytes(
            16 * int(rng.integers(0, 3))
        )
    raw = np.array(raw_bytes, np.int64)
    places = np.cumsum(raw + 7) - raw
    sizes = np.array([len(data) for data in stored], np.int64)
    chunks = describe_chunks(
        np.array(slots, np.int64), sizes, raw, places, np.array(places_of, np.int64)
    ).to(DEVICE)
    arena = torch.full((int(chunks.arena_bytes) + 40,), GARBAGE, dtype=torch.uint8, device=DEVICE)
    faults = torch.full((len(stored),), -1, dtype=torch.int32, device=DEVICE)
    payload = torch.frombuffer(payload, dtype=torch.uint8).to(DEVICE)
    decode_rans(payload, chunks, expand_tables(tables, DEVICE), arena, faults, CHOSEN["kernel"])
    after = arena.cpu().numpy()
    found = [after[place : place + size].copy() for place, size in zip(places, raw, strict=True)]
    for place, size in zip(places, raw, strict=True):
        after[place : place + size] = GARBAGE
    assert (after == GARBAGE).all(), "bytes were written outside the chunks"
    return found, faults.tolist()


def _rare(precision):
    """Symbol 0 almost always, each other once."""
    table = FrequencyTable(precision, np.ones(256, np.int64))
    table.frequencies[0] = (1 << precision) - 255
    return table


def test_every_kind_of_chunk_has_the_bits_of_the_reference():
    uniform = np.random.default_rng(1).integers(0, 256, 500).astype(np.uint8)
    cases = [
        (_symbols(length, sigma, length), None)
        for length, sigma in ((1, 9), (31, 2), (32, 30), (33, 30), (64, 1), (999, 30))
    ]
    cases += [(np.full(100, 128, np.uint8), None), (uniform, fit_table(np.ones(256, np.int64)))]
    cases += [(uniform, _rare(precision)) for precision in (12, 13, 14)]
    symbols = [symbols for symbols, _ in cases]
    tables = [table or fit_table(np.bincount(symbols, minlength=256)) for symbols, table in cases]
    stored = [
        rans_reference.encode(part.tobytes(), table)
        for part, table in zip(symbols, tables, strict=True)
    ]
    found, faults = _decode(stored, [len(part) for part in symbols], range(len(cases)), tables)
    assert faults == [FAULT_NONE] * len(cases)
    for got, expected in zip(found, symbols, strict=True):
        assert np.array_equal(got, expected)


def test_chunks_share_tables_in_any_order():
    tables = [fit_table(np.bincount(_symbols(5000, sigma), minlength=256) + 1) for sigma in (3, 30)]
    used = [1, 0, 0, 1]
    symbols = [_symbols(40 + 10 * number, 20, number) for number in range(4)]
    stored = rans.encode_chunks(
        [rans.Uncoded(part, tables[place]) for part, place in zip(symbols, used, strict=True)]
    )
    found, faults = _decode(stored, [len(part) for part in symbols], used, tables)
    assert faults == [FAULT_NONE] * 4
    assert all(np.array_equal(*pair) for pair in zip(found, symbols, strict=True))


def test_damaged_chunks_end_in_a_fault_and_write_nothing_else():
    rng = np.random.default_rng(2)
    symbols = _symbols(100, 20, 1)
    table = fit_table(np.bincount(symbols, minlength=256))
    good = rans_reference.encode(symbols.tobytes(), table)
    damaged = [
        bytes(len(good)),
        b"\xff" * len(good),
        good[:128],
        good[:-2],
        good + bytes(2),
        good[:128] + bytes(len(good) - 128),
    ]
    for _ in range(40):
        position = int(rng.integers(8 * len(good)))
        one = bytearray(good)
        one[position // 8] ^= 1 << position % 8
        damaged.append(bytes(one))
    damaged += [rng.bytes(len(good)) for _ in range(10)]
    stored = [good, *damaged, good]
    found, faults = _decode(stored, [100] * len(stored), [0] * len(stored), [table])
    assert np.array_equal(found[0], symbols)
    assert np.array_equal(found[-1], symbols)
    assert faults[0] == faults[-1] == FAULT_NONE
    assert set(faults[1:-1]) == {FAULT_STATE, FAULT_WORDS, FAULT_END}
    results = rans.decode_chunks([rans.Coded(data, 100, table) for data in stored])
    assert [isinstance(result, DecodeError) for result in results] == [
        fault != FAULT_NONE for fault in faults
    ]


def test_another_number_of_symbols_is_a_fault():
    symbols = _symbols(100, 20, 1)
    table = fit_table(np.bincount(symbols, minlength=256))
    good = rans_reference.encode(symbols.tobytes(), table)
    lengths = [0, 1, 68, 99, 101, 132, 300]
    _, faults = _decode([good] * len(lengths), lengths, [0] * len(lengths), [table])
    assert FAULT_NONE not in faults


def test_no_chunks():
    _, faults = _decode([], [], [], [])
    assert faults == []


@pytest.mark.parametrize("size", [0, 127, 129])
def test_sizes_are_checked_on_the_host(size):
    with pytest.raises(DecodeError, match="impossible size") as caught:
        describe_chunks(
            *(np.array(values) for values in ([0, 160], [130, size], [5, 5], [0, 16], [0, 0]))
        )
    assert caught.value.chunk == 1


@pytest.mark.parametrize("change", [{0: [8]}, {0: [-16]}, {3: [-1]}, {2: [-1]}, {4: [-1]}])
def test_places_are_checked_on_the_host(change):
    fields = {0: [0], 1: [128], 2: [5], 3: [0], 4: [0]} | change
    with pytest.raises(ValueError, match="negative or not aligned"):
        describe_chunks(*(np.array(fields[number]) for number in range(5)))


@pytest.mark.parametrize("short", ["stored", "arena", "faults", "tables"])
def test_tensors_that_are_too_small_are_refused(short):
    table = fit_table(np.bincount([1, 2], minlength=256))
    chunks = describe_chunks(*(np.array(values) for values in ([16], [128], [5], [3], [0]))).to(
        DEVICE
    )
    sizes = {"stored": 144, "arena": 8, "faults": 1, "tables": 1}
    sizes[short] -= 4 if short == "stored" else 1
    with pytest.raises(ValueError, match="too small"):
        decode_rans(
            torch.zeros(sizes["stored"], dtype=torch.uint8, device=DEVICE),
            chunks,
            expand_tables([table] * sizes["tables"], DEVICE),
            torch.zeros(sizes["arena"], dtype=torch.uint8, device=DEVICE),
            torch.zeros(sizes["faults"], dtype=torch.int32, device=DEVICE),
        )


def test_long_chunks_run_through_the_ring_of_words(kernel):
    if kernel == "triton" and DEVICE.type == "cpu":
        pytest.skip("takes minutes under Triton's interpreter, which has no ring")
    symbols = [
        _symbols(length, sigma, length)
        for length, sigma in ((40_000, 40), (33_333, 1), (20_001, 9), (65_536, 127))
    ]
    tables = [fit_table(np.bincount(part, minlength=256)) for part in symbols]
    stored = rans.encode_chunks([rans.Uncoded(*pair) for pair in zip(symbols, tables, strict=True)])
    found, faults = _decode(stored, [len(part) for part in symbols], range(4), tables)
    assert faults == [FAULT_NONE] * 4
    assert all(np.array_equal(*pair) for pair in zip(found, symbols, strict=True))


def test_the_kernel_in_cuda_c_is_asked_for_where_there_is_none(kernel, monkeypatch):
    if kernel == "triton":
        monkeypatch.setitem(CHOSEN, "kernel", "cuda")
        monkeypatch.setattr(kernels, "cuda_kernel", lambda device: "no NVRTC")
        symbols = _symbols(40, 3)
        table = fit_table(np.bincount(symbols, minlength=256))
        with pytest.raises(UnsupportedEnvironmentError, match="no NVRTC"):
            _decode([rans_reference.encode(symbols.tobytes(), table)], [40], [0], [table])


def test_faults_have_words():
    assert {str(fault_error(fault)) for fault in (FAULT_STATE, FAULT_WORDS, FAULT_END)} == {
        "state of a lane is too small",
        "words of rans chunk are missing or left over",
        "a lane of rans chunk does not end in its initial state",
    }
    assert "unknown fault 9" in str(fault_error(9))
