"""Codec `rans` in numpy: chunks in lockstep, each operation over all lanes of all chunks.

Step s of a chunk codes symbols 32 s to 32 s + 31, one per lane. The lanes of K chunks stand side by
side in arrays of 32 K, so that they share the cost of an operation: one chunk alone runs at 2 to 4
MB/s, 64 together at 20 to 60.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.codecs.rans_reference import LANES, LOWER, STATE_BYTES
from codecllm.formats.codecs.rans_table import FrequencyTable
from codecllm.formats.errors import DecodeError

BATCH_SYMBOLS = 1 << 23
"""Symbols of a batch, each chunk counted as long as the longest; memory is 5 bytes a symbol."""

_RUN_STEPS = 64
_UNREACHED = 1 << 31


class Coded(NamedTuple):
    """A chunk to decode: stored bytes (bytes-like), number of symbols, table of its group."""

    stored: Any
    raw_bytes: int
    table: FrequencyTable


class Uncoded(NamedTuple):
    """A chunk to encode: uint8 [n] symbols, all of them in the table of its group."""

    symbols: NDArray[np.uint8]
    table: FrequencyTable


Decoded = NDArray[np.uint8] | DecodeError
"""The result for a chunk: uint8 [raw_bytes] symbols, or why there are none."""


def decode_chunks(chunks: Sequence[Coded]) -> list[Decoded]:
    """Decodes chunks together; returns the symbols or the error of each, in order."""
    results: dict[int, Decoded] = {}
    for number, chunk in enumerate(chunks):
        if len(chunk.stored) < STATE_BYTES or len(chunk.stored) % 2:
            results[number] = DecodeError(
                "rans chunk has an impossible size", got=len(chunk.stored)
            )
    sound = [number for number in range(len(chunks)) if number not in results]
    for batch in _batches(sound, [chunk.raw_bytes for chunk in chunks]):
        results |= zip(batch, _decode_batch([chunks[number] for number in batch]), strict=True)
    return [results[number] for number in range(len(chunks))]


def encode_chunks(chunks: Sequence[Uncoded]) -> list[bytes]:
    """Encodes chunks together; returns their stored bytes in order."""
    results: dict[int, bytes] = {}
    for batch in _batches(range(len(chunks)), [len(chunk.symbols) for chunk in chunks]):
        results |= zip(batch, _encode_batch([chunks[number] for number in batch]), strict=True)
    return [results[number] for number in range(len(chunks))]


def _batches(numbers: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Puts chunks of like length together, longest first, up to BATCH_SYMBOLS a batch."""
    batch: list[int] = []
    for number in sorted(numbers, key=lambda number: (-lengths[number], number)):
        if batch and (len(batch) + 1) * max(lengths[batch[0]], LANES) > BATCH_SYMBOLS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class _Run:
    """Steps [first, last) of the same lanes.

    `idle` are flat lane numbers that stop before `first`.
    """

    first: int
    last: int
    idle: NDArray[np.intp]


def _runs(lengths: list[int]) -> list[_Run]:
    """Cuts the steps of a batch into runs of at most 64, and wherever a chunk ends."""
    missing = LANES - 1 - np.arange(LANES)
    stops = ((np.array(lengths)[:, None] + missing) // LANES).reshape(
        -1
    )  # in how many steps each lane works
    steps = int(stops.max())
    bounds = sorted({*range(0, steps, _RUN_STEPS), *stops.tolist()})
    return [_Run(first, last, np.flatnonzero(stops == first)) for first, last in pairwise(bounds)]


def _distinct(tables: Sequence[FrequencyTable]) -> tuple[list[FrequencyTable], NDArray[np.intp]]:
    """Returns the different tables of a batch and each chunk's place among them."""
    places: dict[int, int] = {}
    distinct: list[FrequencyTable] = []
    for table in tables:
        # By identity: the chunks of a group share one object.
        if id(table) not in places:
            places[id(table)] = len(distinct)
            distinct.append(table)
    return distinct, np.array([places[id(table)] for table in tables], np.intp)


def _decode_batch(chunks: list[Coded]) -> list[Decoded]:
    count, runs = len(chunks), _runs([chunk.raw_bytes for chunk in chunks])
    lanes = _DecodingLanes(chunks)
    rows = np.empty((runs[-1].last if runs else 0, count * LANES), np.uint8)
    for run in runs:
        lanes.stop(run.idle)
        lanes.decode(rows[run.first : run.last])
    by_chunk = rows.reshape(-1, count, LANES)
    return [
        error or np.ascontiguousarray(by_chunk[:, number]).reshape(-1)[: chunk.raw_bytes]
        for number, (chunk, error) in enumerate(zip(chunks, lanes.errors(), strict=True))
    ]


class _DecodingLanes:
    """The states of all lanes of a batch, and where each chunk's next word lies.

    The slots of all tables stand one after another in `_entries`, four uint16 each: slot - start,
    frequency, symbol, 0. Entry 0 belongs to lanes that have stopped: its frequency of 1 leaves a
    state as it is.
    """

    def __init__(self, chunks: list[Coded]) -> None:
        count = len(chunks)
        tables, places = _distinct([chunk.table for chunk in chunks])
        self._entries, bases = _decoding_entries(tables)
        precisions = np.array([table.precision for table in tables], np.uint32)[places]
        self._base = np.repeat(bases[places], LANES)
        self._precision = np.repeat(precisions, LANES)
        self._mask = (np.uint32(1) << self._precision) - np.uint32(1)
        self._states = np.concatenate(
            [np.frombuffer(chunk.stored, "<u4", LANES) for chunk in chunks]
        ).astype(np.uint32)
        self._smallest = self._states.reshape(count, LANES).min(axis=1)
        # A smaller state is an error, noted in `_smallest`; the lockstep goes on without it.
        np.maximum(self._states, np.uint32(LOWER), out=self._states)
        words = [np.frombuffer(chunk.stored, "<u2", offset=STATE_BYTES) for chunk in chunks]
        # A spare word at the end, for chunks that ask for more than they have.
        self._words = np.concatenate([*words, np.zeros(1, np.uint16)]).astype(np.uint32)
        sizes = np.array([len(part) for part in words], np.intp)
        self._ends = np.cumsum(sizes)
        # Column 0: place of the word that a chunk read last; behind it, whether each lane needs a
        # word. Summed along a row, this gives the place of every lane's word.
        self._needs = np.zeros((count, 1 + LANES), np.intp)
        self._needs[:, 0] = self._ends - sizes - 1
        self._places = np.empty_like(self._needs)
        self._index = np.empty(count * LANES, np.intp)
        self._need = np.empty((count, LANES), np.bool_)
        self._word = np.empty((count, LANES), np.uint32)
        self._refilled = np.empty((count, LANES), np.uint32)
        self._found = np.empty((_RUN_STEPS, count * LANES), np.uint64)

    def stop(self, idle: NDArray[np.intp]) -> None:
        """Lets lanes (flat numbers) do nothing from now on."""
        self._base[idle] = 0
        self._precision[idle] = 0
        self._mask[idle] = 0

    def decode(self, rows: NDArray[np.uint8]) -> None:
        """Decodes one symbol per lane into each row of uint8 [steps, lanes], at most 64 rows."""
        states, by_chunk, index, need = (
            self._states,
            self._states.reshape(self._need.shape),
            self._index,
            self._need,
        )
        lane_needs, lane_places, last_place = (
            self._needs[:, 1:],
            self._places[:, 1:],
            self._places[:, LANES],
        )
        fields = self._found.view(np.uint16).reshape(*self._found.shape, 4)
        lower = np.uint32(LOWER)
        for step in range(len(rows)):
            np.bitwise_and(states, self._mask, out=index, casting="unsafe")
            np.add(index, self._base, out=index)
            # clip: under its default mode numpy copies `out` to check the indices first.
            self._entries.take(index, out=self._found[step], mode="clip")
            np.right_shift(states, self._precision, out=states)
            np.multiply(states, fields[step, :, 1], out=states)
            np.add(states, fields[step, :, 0], out=states)
            np.less(by_chunk, lower, out=need)
            lane_needs[...] = need
            np.add.accumulate(self._needs, axis=1, out=self._places)
            self._needs[:, 0] = last_place
            self._words.take(lane_places, out=self._word, mode="clip")
            np.left_shift(by_chunk, 16, out=self._refilled)
            np.bitwise_or(self._refilled, self._word, out=self._refilled)
            np.copyto(by_chunk, self._refilled, where=need)
        rows[...] = fields[: len(rows), :, 2]

    def errors(self) -> list[DecodeError | None]:
        """Returns the error of each chunk, or None, once all steps are done."""
        whole = (self._states.reshape(self._need.shape) == LOWER).all(axis=1)
        words_left = self._ends - 1 - self._needs[:, 0]
        return [
            _fault(*facts)
            for facts in zip(
                self._smallest.tolist(), words_left.tolist(), whole.tolist(), strict=True
            )
        ]


def _fault(smallest: int, words_left: int, whole: bool) -> DecodeError | None:
    if smallest < LOWER:
        return DecodeError(
            "state of a lane is too small", got=smallest, expected=f"at least {LOWER}"
        )
    if words_left < 0:
        return DecodeError("rans chunk ends early", got=f"{-words_left} words too few")
    if words_left > 0:
        return DecodeError("words of rans chunk are left over", got=words_left, expected=0)
    return None if whole else DecodeError("a lane of rans chunk does not end in its initial state")


def _decoding_entries(tables: list[FrequencyTable]) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    """Returns uint64 entries (see `_DecodingLanes`) and the place at which each table's begin."""
    parts = [np.array([[0, 1, 0, 0]], np.uint16)]
    bases, base = [], 1
    for table in tables:
        slots = 1 << table.precision
        symbols = np.repeat(np.arange(256), table.frequencies)
        entries = np.zeros((slots, 4), np.uint16)
        entries[:, 0] = np.arange(slots) - table.starts[symbols]
        entries[:, 1] = table.frequencies[symbols]
        entries[:, 2] = symbols
        parts.append(entries)
        bases.append(base)
        base += slots
    return np.concatenate(parts).view(np.uint64).reshape(-1), np.array(bases, np.intp)


def _encode_batch(chunks: list[Uncoded]) -> list[bytes]:
    count, lengths = len(chunks), [len(chunk.symbols) for chunk in chunks]
    runs = _runs(lengths)
    rows = np.zeros((runs[-1].last if runs else 0, count, LANES), np.uint8)
    for number, chunk in enumerate(chunks):
        steps, rest = divmod(len(chunk.symbols), LANES)
        rows[:steps, number] = chunk.symbols[: steps * LANES].reshape(steps, LANES)
        rows[steps : steps + 1, number, :rest] = chunk.symbols[steps * LANES :]
    lanes = _EncodingLanes([chunk.table for chunk in chunks])
    for run in runs:
        lanes.pause(run.idle)
    pieces = [[np.empty(0, np.uint16)] for _ in chunks]
    for run in reversed(runs):
        for piece, words in zip(pieces, lanes.encode(rows[run.first : run.last]), strict=True):
            piece.append(words)
        lanes.resume(run.idle)
    states = lanes.states.reshape(count, LANES).astype("<u4")
    return [
        chunk_states.tobytes() + np.concatenate(words[::-1]).astype("<u2").tobytes()
        for chunk_states, words in zip(states, pieces, strict=True)
    ]


class _EncodingLanes:
    """The states of all lanes of a batch, coding their symbols from the last to the first.

    The symbols of all tables stand one after another, 256 each; before them 256 for lanes that
    pause: a frequency that no state reaches and a complement of 0 leave a state as it is.

    Attributes:
        states: uint32 [lanes].
    """

    def __init__(self, tables: list[FrequencyTable]) -> None:
        distinct, places = _distinct(tables)
        totals = [np.uint32(1 << table.precision) for table in distinct]
        self._frequencies = _per_symbol(_UNREACHED, [table.frequencies for table in distinct])
        self._starts = _per_symbol(0, [table.starts for table in distinct])
        self._complements = _per_symbol(
            0, [total - table.frequencies for total, table in zip(totals, distinct, strict=True)]
        )
        self._own_base = np.repeat(256 * (1 + places), LANES)
        self._base = self._own_base.copy()
        precisions = np.array([table.precision for table in distinct], np.uint32)[places]
        self._shift = np.repeat(np.uint32(32) - precisions, LANES)
        self.states = np.full(len(self._base), LOWER, np.uint32)
        self._top = np.empty_like(self.states)
        self._words = np.empty((_RUN_STEPS, len(self._base)), np.uint16)
        self._sent = np.empty(self._words.shape, np.bool_)

    def pause(self, idle: NDArray[np.intp]) -> None:
        """Lets lanes (flat numbers) do nothing until `resume`."""
        self._base[idle] = 0

    def resume(self, idle: NDArray[np.intp]) -> None:
        """Lets lanes work from now on."""
        self._base[idle] = self._own_base[idle]

    def encode(self, rows: NDArray[np.uint8]) -> list[NDArray[np.uint16]]:
        """Codes the symbols of uint8 [steps, chunks, 32], at most 64 steps, the last one first.

        Returns:
            Per chunk uint16 [n], the words that a decoder of these rows needs, in its order.
        """
        steps, chunks, _ = rows.shape
        index = rows.reshape(steps, -1) + self._base
        frequencies, starts = self._frequencies.take(index), self._starts.take(index)
        complements = self._complements.take(index)
        states, top = self.states, self._top
        for step in reversed(range(steps)):
            is_sent = self._sent[step]
            np.right_shift(states, self._shift, out=top)
            np.greater_equal(top, frequencies[step], out=is_sent)
            np.copyto(self._words[step], states, casting="unsafe")
            np.left_shift(is_sent.view(np.uint8), 4, out=top, casting="unsafe")
            np.right_shift(states, top, out=states)
            np.floor_divide(states, frequencies[step], out=top)
            # quotient << precision, plus remainder, plus start: the remainder is state - quotient *
            # frequency.
            np.multiply(top, complements[step], out=top)
            np.add(states, starts[step], out=states)
            np.add(states, top, out=states)
        is_sent = self._sent[:steps].reshape(steps, chunks, LANES).transpose(1, 0, 2)
        words = self._words[:steps].reshape(steps, chunks, LANES).transpose(1, 0, 2)[is_sent]
        return np.split(words, np.cumsum(is_sent.sum(axis=(1, 2)))[:-1])


def _per_symbol(paused: int, values: list[NDArray[np.int64]]) -> NDArray[np.uint32]:
    """Returns uint32 [256 * (1 + tables)]: the value for paused lanes, then those of each table."""
    return np.concatenate([np.full(256, paused, np.int64), *values]).astype(np.uint32)
