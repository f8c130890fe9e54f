"""Frequency tables of codec `rans`, as packed in `X_tables` (SPEC.md 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.errors import DecodeError

MIN_PRECISION = 12
MAX_PRECISION = 14
_BITMAP_BYTES = 32
_HEAD_BYTES = 1 + _BITMAP_BYTES
_CONTINUED = 0x80
MAX_TABLE_BYTES = _HEAD_BYTES + 2 * 256


@dataclass(frozen=True, slots=True, eq=False)
class FrequencyTable:
    """The static model that a group of chunks shares.

    Attributes:
        precision: frequencies add up to 2^precision; 12 to 14.
        frequencies: int64 [256], 0 where a symbol does not occur.
    """

    precision: int
    frequencies: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """int64 [256]: the first slot of each symbol, which has as many slots as its frequency."""
        return np.cumsum(self.frequencies) - self.frequencies


def pack_table(table: FrequencyTable) -> bytes:
    """Returns the bytes of a table: precision, bitmap, then frequency - 1 in one or two bytes.

    Examples:
        >>> table = FrequencyTable(12, np.zeros(256, np.int64))
        >>> table.frequencies[[1, 2]] = 4095, 1
        >>> pack_table(table)[:3].hex(), pack_table(table)[33:].hex()
        ('0c0600', 'fe1f00')
        >>> parse_table(pack_table(table)).frequencies[:4].tolist()
        [0, 4095, 1, 0]
    """
    present = table.frequencies > 0
    table_bytes = bytearray([table.precision])
    table_bytes += np.packbits(present, bitorder="little").tobytes()
    for frequency in table.frequencies[present].tolist():
        low, high = (frequency - 1) & 0x7F, (frequency - 1) >> 7
        table_bytes += bytes([low | _CONTINUED, high] if high else [low])
    return bytes(table_bytes)


def parse_table(data: Any) -> FrequencyTable:
    """Reads a table, all of `data` (bytes-like).

    Raises:
        DecodeError: it does not follow SPEC.md 6.
    """
    table_bytes = bytes(data)
    if len(table_bytes) < _HEAD_BYTES:
        raise DecodeError(
            "rans table is shorter than its head", got=len(table_bytes), expected=_HEAD_BYTES
        )
    precision = table_bytes[0]
    if not MIN_PRECISION <= precision <= MAX_PRECISION:
        raise DecodeError(
            "precision of rans table", got=precision, expected=f"{MIN_PRECISION} to {MAX_PRECISION}"
        )
    present = np.unpackbits(
        np.frombuffer(table_bytes, np.uint8, _BITMAP_BYTES, 1), bitorder="little"
    ).astype(bool)
    frequencies = np.zeros(256, np.int64)
    frequencies[present] = _read_frequencies(table_bytes[_HEAD_BYTES:], int(present.sum()))
    total = int(frequencies.sum())
    if total != 1 << precision:
        raise DecodeError(
            "frequencies of rans table do not add up", got=total, expected=1 << precision
        )
    return FrequencyTable(precision, frequencies)


def parse_tables(packed: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Reads many tables at once, hundreds of times as fast as one by one.

    Returns:
        int64 [n] precisions and int64 [n, 256] frequencies, as `parse_table` gives them.

    Raises:
        DecodeError: one does not follow SPEC.md 6; `chunk` is its number.
    """
    sizes = np.array([len(data) for data in packed], np.int64)
    # One column more than the longest table, so that each byte has a following one.
    width = int(sizes.clip(_HEAD_BYTES, MAX_TABLE_BYTES).max(initial=_HEAD_BYTES)) + 1
    all_bytes = np.frombuffer(
        b"".join(bytes(data[: width - 1]).ljust(width, b"\0") for data in packed), np.uint8
    )
    rows = all_bytes.reshape(len(packed), width)
    precisions = rows[:, 0].astype(np.int64)
    present = np.unpackbits(rows[:, 1:_HEAD_BYTES], axis=1, bitorder="little").astype(np.bool_)
    body = rows[:, _HEAD_BYTES:]
    inside = np.arange(body.shape[1]) < sizes[:, None] - _HEAD_BYTES
    wide = (body >= _CONTINUED) & inside
    second = np.zeros_like(wide)
    second[:, 1:] = wide[:, :-1]
    following = np.zeros(body.shape, np.int64)
    following[:, :-1] = body[:, 1:]
    starts = inside & ~second
    sound = (sizes >= _HEAD_BYTES) & (sizes <= MAX_TABLE_BYTES)
    sound &= (precisions >= MIN_PRECISION) & (precisions <= MAX_PRECISION)
    # A second byte of 0 is refused: each table has one encoding.
    sound &= ~(second & (wide | ~inside | (body == 0))).any(axis=1) & (
        starts.sum(axis=1) == present.sum(axis=1)
    )
    frequencies = np.zeros((len(packed), 256), np.int64)
    if sound.all():
        values = (body & (_CONTINUED - 1)) + np.where(wide, following << 7, 0) + 1
        frequencies[present] = values[starts]
        sound &= frequencies.sum(axis=1) == np.int64(1) << precisions
    for number in np.flatnonzero(~sound).tolist():
        try:
            parse_table(packed[number])
        except DecodeError as exc:
            raise exc.located(chunk=number) from None
    return precisions, frequencies


def _read_frequencies(data: bytes, count: int) -> list[int]:
    frequencies, position = [], 0
    for _ in range(count):
        piece = data[position : position + 2]
        if not piece or (
            piece[0] & _CONTINUED and (len(piece) < 2 or not 0 < piece[1] < _CONTINUED)
        ):
            raise DecodeError("frequency of rans table is cut off or malformed", got=piece.hex())
        wide = bool(piece[0] & _CONTINUED)
        frequencies.append(((piece[0] & 0x7F) | (piece[1] << 7 if wide else 0)) + 1)
        position += 2 if wide else 1
    if position != len(data):
        raise DecodeError("rans table has a wrong size", got=len(data), expected=position)
    return frequencies
