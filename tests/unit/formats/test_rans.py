"""rans: every path gives the reference's bits, and damaged chunks or tables are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codecllm.formats.codecs import rans, rans_numpy, rans_reference
from codecllm.formats.codecs.entropy import counted_entropy_bits
from codecllm.formats.codecs.rans_fit import (
    coded_bits,
    fit_frequencies,
    fit_table,
    fit_table_plainly,
)
from codecllm.formats.codecs.rans_table import (
    MAX_TABLE_BYTES,
    FrequencyTable,
    pack_table,
    parse_table,
    parse_tables,
)
from codecllm.formats.errors import DecodeError

PRECISIONS = (12, 13, 14)


def _counts(symbols):
    return np.bincount(symbols, minlength=256)


def _gaussian(count, sigma, seed=0):
    codes = np.random.default_rng(seed).normal(0, sigma, count).round().clip(-127, 127)
    return codes.astype(np.int8).view(np.uint8)


def _table(precision, frequencies):
    table = FrequencyTable(precision, np.zeros(256, np.int64))
    for symbol, frequency in frequencies.items():
        table.frequencies[symbol] = frequency
    return table


def _kinds():
    """Symbols, and a table that holds them all, of every kind that may be special."""
    rng = np.random.default_rng(3)
    for length in (0, 1, 31, 32, 33, 64, 2079, 4096):
        yield (
            f"gaussian {length}",
            _gaussian(length, 20, length),
            fit_table(_counts(_gaussian(5000, 20)) + 1),
        )
    yield "one symbol", np.full(999, 200, np.uint8), fit_table(_counts(np.full(999, 200, np.uint8)))
    uniform = rng.integers(0, 256, 8000).astype(np.uint8)
    yield "256 symbols uniform", uniform, fit_table(np.ones(256, np.int64))
    for precision in PRECISIONS:
        rare = _table(precision, {0: (1 << precision) - 255} | dict.fromkeys(range(1, 256), 1))
        yield f"frequency 1 at {precision} bits", rng.integers(0, 256, 4001).astype(np.uint8), rare
        most = _table(precision, {7: (1 << precision) - 1, 8: 1})
        yield (
            f"all but one at {precision} bits",
            (rng.random(3000) < 0.01).astype(np.uint8) + np.uint8(7),
            most,
        )


KINDS = {name: (symbols, table) for name, symbols, table in _kinds()}


@pytest.mark.parametrize("name", KINDS)
def test_every_path_gives_the_bits_of_the_reference(name, path):
    symbols, table = KINDS[name]
    expected = rans_reference.encode(symbols.tobytes(), table)
    assert rans.encode_chunks([rans.Uncoded(symbols, table)]) == [expected]
    assert rans_reference.decode(expected, len(symbols), table) == symbols.tobytes()
    (decoded,) = rans.decode_chunks([rans.Coded(expected, len(symbols), table)])
    assert np.array_equal(decoded, symbols)


def test_chunks_of_any_length_and_table_go_together(path):
    chunks = [rans.Uncoded(symbols, table) for symbols, table in KINDS.values()]
    stored = rans.encode_chunks(chunks)
    assert stored == [
        rans_reference.encode(symbols.tobytes(), table) for symbols, table in KINDS.values()
    ]
    decoded = rans.decode_chunks(
        [
            rans.Coded(memoryview(data), len(chunk.symbols), chunk.table)
            for data, chunk in zip(stored, chunks, strict=True)
        ]
    )
    for symbols, chunk in zip(decoded, chunks, strict=True):
        assert np.array_equal(symbols, chunk.symbols)


def test_batches_bound_the_memory_and_change_nothing(monkeypatch):
    table = fit_table(_counts(_gaussian(5000, 20)) + 1)
    chunks = [
        rans.Uncoded(_gaussian(length, 20, length), table)
        for length in (100, 3000, 0, 2999, 1, 500)
    ]
    together = rans_numpy.encode_chunks(chunks)
    monkeypatch.setattr(rans_numpy, "BATCH_SYMBOLS", 4000)
    batches = [
        list(batch)
        for batch in rans_numpy._batches(range(6), [len(chunk.symbols) for chunk in chunks])
    ]
    assert batches == [[1], [3], [5, 0, 4, 2]]
    assert rans_numpy.encode_chunks(chunks) == together


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_anything_comes_back(path, data):
    table_symbols = data.draw(st.binary(min_size=1, max_size=300))
    table = fit_table(_counts(np.frombuffer(table_symbols, np.uint8)))
    alphabet = st.sampled_from(sorted(set(table_symbols)))
    chunks = data.draw(
        st.lists(st.lists(alphabet, max_size=200).map(bytes), min_size=1, max_size=4)
    )
    stored = rans.encode_chunks(
        [rans.Uncoded(np.frombuffer(chunk, np.uint8), table) for chunk in chunks]
    )
    decoded = rans.decode_chunks(
        [rans.Coded(d, len(c), table) for d, c in zip(stored, chunks, strict=True)]
    )
    for chunk, part, symbols in zip(chunks, stored, decoded, strict=True):
        assert part == rans_reference.encode(chunk, table)
        assert symbols.tobytes() == chunk == rans_reference.decode(part, len(chunk), table)


def test_exact_bytes():
    """A round trip cannot see a change of the format; this can."""
    table = _table(12, {1: 2048, 2: 1024, 3: 1024})
    stored = rans_reference.encode(bytes([1, 2, 3, 1] * 160), table)
    assert (
        stored.hex()
        == "00001000aaaa0a01ffff0f0100001000" * 8 + "0000aaa8fffc0000" * 8 + "00a800fc" * 8
    )


def _both(stored, raw_bytes, table):
    """Both decoders on any bytes: equal symbols, or an error of each."""
    try:
        expected = rans_reference.decode(bytes(stored), raw_bytes, table)
    except DecodeError:
        expected = None
    (got,) = rans.decode_chunks([rans.Coded(bytes(stored), raw_bytes, table)])
    if expected is None:
        assert isinstance(got, DecodeError)
        return None
    assert got.tobytes() == expected
    return expected


def test_every_bit_of_a_chunk(path):
    """Unlike a frame of zstd, a chunk of rans ends in a known state.

    Hardly a flip passes even without its checksum.
    """
    symbols = _gaussian(300, 6, 1)
    table = fit_table(_counts(symbols))
    stored = rans_reference.encode(symbols.tobytes(), table)
    assert _both(stored, len(symbols), table) == symbols.tobytes()
    passed = 0
    for position in range(8 * len(stored)):
        damaged = bytearray(stored)
        damaged[position // 8] ^= 1 << position % 8
        passed += _both(damaged, len(symbols), table) is not None
    assert passed == 0


@pytest.mark.parametrize("change", [-129, -128, -2, -1, 1, 2, 64])
def test_chunks_of_another_size(change, path):
    symbols = _gaussian(3000, 6, 1)
    table = fit_table(_counts(symbols))
    stored = rans_reference.encode(symbols.tobytes(), table)
    assert _both((stored + bytes(64))[: len(stored) + change], len(symbols), table) is None


@pytest.mark.parametrize(
    "stored",
    [b"", bytes(2), bytes(126), bytes(127), bytes(128), bytes(129), b"\xff" * 128, b"\xff" * 900],
)
def test_bytes_that_no_encoder_makes(stored, path):
    table = fit_table(_counts(_gaussian(3000, 6)))
    for raw_bytes in (1, 33, 1000):
        assert _both(stored, raw_bytes, table) is None


def test_another_number_of_symbols(path):
    symbols = _gaussian(3000, 6, 1)
    table = fit_table(_counts(symbols))
    stored = rans_reference.encode(symbols.tobytes(), table)
    for raw_bytes in (0, 1, 2968, 2999, 3001, 3032):
        assert _both(stored, raw_bytes, table) is None


def test_one_damaged_chunk_leaves_its_neighbours_alone(path):
    table = fit_table(_counts(_gaussian(3000, 6)) + 1)
    chunks = [_gaussian(length, 6, length) for length in (3000, 2500, 3000, 100)]
    stored = [rans_reference.encode(chunk.tobytes(), table) for chunk in chunks]
    stored[1] = stored[1][:128] + bytes(len(stored[1]) - 128)
    stored[2] = stored[2][:-40]
    results = rans.decode_chunks(
        [rans.Coded(d, len(c), table) for d, c in zip(stored, chunks, strict=True)]
    )
    assert [isinstance(result, DecodeError) for result in results] == [False, True, True, False]
    assert np.array_equal(results[0], chunks[0])
    assert np.array_equal(results[3], chunks[3])


@pytest.mark.parametrize("name", KINDS)
def test_tables_come_back(name):
    table = KINDS[name][1]
    packed = pack_table(table)
    again = parse_table(packed)
    assert again.precision == table.precision
    assert np.array_equal(again.frequencies, table.frequencies)
    assert len(packed) <= MAX_TABLE_BYTES


def test_exact_bytes_of_a_table():
    packed = pack_table(_table(12, {0: 1, 9: 128, 10: 129, 255: 4096 - 258}))
    assert packed.hex() == "0c" + "0106" + "00" * 29 + "80" + "00" + "7f" + "8001" + "fd1d"


FLAWS = {
    "empty": (lambda t: b"", "shorter"),
    "head only": (lambda t: t[:32], "shorter"),
    "precision 11": (lambda t: b"\x0b" + t[1:], "precision"),
    "precision 15": (lambda t: b"\x0f" + t[1:], "precision"),
    "another precision": (lambda t: b"\x0d" + t[1:], "add up"),
    "no symbol": (lambda t: b"\x0c" + bytes(32), "add up"),
    "a symbol more": (lambda t: t[:5] + b"\xff" + t[6:], "cut off"),
    "cut": (lambda t: t[:-1], "cut off"),
    "a byte more": (lambda t: t + b"\0", "wrong size"),
    "a frequency more": (lambda t: t[:33] + bytes([t[33] + 1]) + t[34:], "add up"),
    "wide without need": (lambda t: t[:33] + bytes([t[33] | 0x80, 0]) + t[34:], "malformed"),
    "wider than 14 bits": (lambda t: t[:-1] + b"\x80", "malformed"),
}


@pytest.mark.parametrize("name", FLAWS)
def test_flaws_of_a_table(name):
    change, words = FLAWS[name]
    good = pack_table(_table(12, {0: 3, 9: 128, 10: 129, 255: 4096 - 260}))
    assert parse_table(good).precision == 12
    with pytest.raises(DecodeError, match=words):
        parse_table(change(good))


@settings(max_examples=500)
@given(
    st.lists(st.integers(0, 10_000_000) | st.integers(0, 3), min_size=1, max_size=256).filter(any)
)
def test_both_ways_fit_the_same_tables(counts):
    counts = np.array(counts + [0] * (256 - len(counts)))
    fitted, plain = fit_table(counts), fit_table_plainly(counts)
    assert fitted.precision == plain.precision
    assert np.array_equal(fitted.frequencies, plain.frequencies)


@given(
    st.lists(st.integers(0, 10_000) | st.integers(0, 3), min_size=1, max_size=256).filter(any),
    st.sampled_from(PRECISIONS),
)
def test_fitted_frequencies(counts, precision):
    counts = np.array(counts + [0] * (256 - len(counts)))
    frequencies = fit_frequencies(counts, precision)
    assert frequencies.sum() == 1 << precision
    assert np.array_equal(frequencies > 0, counts > 0)
    # No single unit moved from one symbol to another makes the counted symbols cheaper.
    used = np.flatnonzero(counts)
    gain = counts[used] * np.log2((frequencies[used] + 1) / frequencies[used])
    can_lose = frequencies[used] > 1
    loss = counts[used][can_lose] * np.log2(
        frequencies[used][can_lose] / (frequencies[used][can_lose] - 1)
    )
    if len(loss) and len(used) > 1:
        assert gain.max() <= loss.min() + counts.max() * 2.0**-14


@pytest.mark.parametrize("bits", [1.5, 2.5, 4.0, 5.5, 7.0, 7.5])
@pytest.mark.parametrize(("chunk", "allowed"), [(1 << 17, 0.02), (1 << 16, 0.03)])
def test_sizes_stay_near_the_entropy_of_the_group(bits, chunk, allowed):
    """Tables, states and padding counted, over groups of a million symbols."""
    sigma = 2**bits / np.sqrt(2 * np.pi * np.e)
    symbols = _gaussian(1 << 20, sigma)
    counts = _counts(symbols)
    table = fit_table(counts)
    stored = rans.encode_chunks([rans.Uncoded(part, table) for part in symbols.reshape(-1, chunk)])
    total = sum(-(-len(data) // 16) * 16 for data in stored) + len(pack_table(table)) + 2
    assert 8 * total / symbols.size < counted_entropy_bits(counts) / symbols.size + allowed
    assert abs(
        coded_bits(table, counts) / 8 - sum(len(data) - 128 for data in stored)
    ) < 0.003 * symbols.size / 8 + 128 * len(stored)


def test_many_tables_at_once_are_those_of_one_by_one():
    rng = np.random.default_rng(11)
    counts = [
        rng.integers(0, 1000, 256) * (rng.random(256) < share)
        for share in (0.01, 0.1, 0.5, 1.0)
        for _ in range(5)
    ]
    counts += [np.eye(256, dtype=np.int64)[7], np.ones(256, np.int64), np.arange(256) ** 3]
    packed = [
        pack_table(fit_table(np.maximum(count, 0) + (np.arange(256) == 3))) for count in counts
    ]
    precisions, frequencies = parse_tables(packed)
    for number, data in enumerate(packed):
        table = parse_table(data)
        assert (precisions[number], frequencies[number].tolist()) == (
            table.precision,
            table.frequencies.tolist(),
        )
    precisions, frequencies = parse_tables([])
    assert precisions.shape == (0,) and frequencies.shape == (0, 256)


def _refusal(parse):
    try:
        parse()
    except DecodeError as exc:
        return exc
    return None


def test_a_malformed_table_among_many_gets_the_error_of_one_by_one():
    good = pack_table(fit_table(np.arange(256) ** 2 + 1))
    rng, refused = np.random.default_rng(3), 0
    damaged = [good[:cut] for cut in (0, 1, 32, 33, 40, len(good) - 1)] + [
        good + b"\0",
        good + bytes(600),
    ]
    for _ in range(300):
        changed = bytearray(good)
        changed[int(rng.integers(len(good)))] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(changed))
    for data in damaged:
        alone = _refusal(lambda data=data: parse_table(data))
        among = _refusal(lambda data=data: parse_tables([good, data, good]))
        assert (alone is None) == (among is None)
        if alone is not None and among is not None:
            refused += 1
            assert (among.message, among.got, among.chunk) == (alone.message, alone.got, 1)
    assert refused > 250
