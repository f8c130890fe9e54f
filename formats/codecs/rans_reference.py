"""Codec `rans`: the pseudo-code of SPEC.md 6 in Python, the reference of every fast path.

Range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) with 32 interleaved states, as in
Giesen 2014 (arXiv 1402.3392).
"""

from __future__ import annotations

import struct

import numpy as np

from codecllm.formats.codecs.rans_table import FrequencyTable
from codecllm.formats.errors import DecodeError

LANES = 32
LOWER = 1 << 16
STATE_BYTES = 4 * LANES


def decode(stored: bytes, raw_bytes: int, table: FrequencyTable) -> bytes:
    """Returns the `raw_bytes` symbols of a chunk.

    Raises:
        DecodeError: `stored` is no chunk of `raw_bytes` symbols.
    """
    if len(stored) < STATE_BYTES or len(stored) % 2:
        raise DecodeError("rans chunk has an impossible size", got=len(stored))
    states = list(struct.unpack_from(f"<{LANES}I", stored))
    words = list(struct.unpack_from(f"<{(len(stored) - STATE_BYTES) // 2}H", stored, STATE_BYTES))
    if min(states) < LOWER:
        raise DecodeError(
            "state of a lane is too small", got=min(states), expected=f"at least {LOWER}"
        )
    precision, frequencies, starts = (
        table.precision,
        table.frequencies.tolist(),
        table.starts.tolist(),
    )
    symbol_of_slot = np.repeat(np.arange(256), table.frequencies).tolist()
    symbols, position = bytearray(), 0
    for index in range(raw_bytes):
        lane = index % LANES
        slot = states[lane] & ((1 << precision) - 1)
        symbol = symbol_of_slot[slot]
        state = frequencies[symbol] * (states[lane] >> precision) + slot - starts[symbol]
        # One word is enough: a state of 2^16 or more keeps at least 2 bits under 14 bits of
        # precision.
        if state < LOWER:
            if position == len(words):
                raise DecodeError("rans chunk ends early", got=f"{len(words)} words")
            state = (state << 16) | words[position]
            position += 1
        states[lane] = state
        symbols.append(symbol)
    if position != len(words):
        raise DecodeError("words of rans chunk are left over", got=len(words), expected=position)
    if states != [LOWER] * LANES:
        raise DecodeError("a lane of rans chunk does not end in its initial state")
    return bytes(symbols)


def encode(symbols: bytes, table: FrequencyTable) -> bytes:
    """Returns the stored bytes of a chunk; every symbol must have a frequency in the table.

    Examples:
        >>> import numpy as np
        >>> table = FrequencyTable(12, np.zeros(256, np.int64))
        >>> table.frequencies[[1, 2, 3]] = 2048, 1024, 1024
        >>> stored = encode(bytes([1, 2, 3, 1]) * 160, table)
        >>> len(stored), decode(stored, 640, table) == bytes([1, 2, 3, 1]) * 160
        (224, True)
    """
    precision, frequencies, starts = (
        table.precision,
        table.frequencies.tolist(),
        table.starts.tolist(),
    )
    states, words = [LOWER] * LANES, list[int]()
    # Backward: states are a stack, and the decoder has to read forward.
    for index in reversed(range(len(symbols))):
        lane, symbol = index % LANES, symbols[index]
        state, frequency = states[lane], frequencies[symbol]
        # Keeps the state below 2^32 behind this symbol.
        if state >= frequency << (32 - precision):
            words.append(state & 0xFFFF)
            state >>= 16
        states[lane] = ((state // frequency) << precision) + state % frequency + starts[symbol]
    return struct.pack(f"<{LANES}I{len(words)}H", *states, *reversed(words))
