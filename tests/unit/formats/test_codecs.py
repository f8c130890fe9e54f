"""raw and zstd: exact frames, bounded memory, and no damaged frame of a wrong size."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import zstandard

from codecllm.formats import limits
from codecllm.formats.codecs import CODEC_IDS, CODECS, zstd
from codecllm.formats.errors import DecodeError

ZSTD, RAW = CODECS[CODEC_IDS["zstd"]], CODECS[CODEC_IDS["raw"]]


def test_exact_frame():
    """A round trip cannot see a change of the bytes; this can (for one version of libzstd)."""
    if zstandard.ZSTD_VERSION[:2] != (1, 5):
        pytest.skip(f"libzstd {zstandard.ZSTD_VERSION}: the exact bytes are pinned for 1.5")
    assert ZSTD.encode(bytes([7]) * 64).hex() == "28b52ffd20404500001007070100930016"


def test_frame_declares_its_size_and_no_checksum():
    parameters = zstandard.get_frame_parameters(ZSTD.encode(bytes(1000)))
    assert (parameters.content_size, parameters.has_checksum, parameters.dict_id) == (
        1000,
        False,
        0,
    )


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
@pytest.mark.parametrize("size", [1, 2, 255, 4096, 1 << 17, (1 << 17) + 1])
def test_round_trip(codec, size):
    symbols = np.random.default_rng(size).normal(0, 30, size).astype(np.int8).tobytes()
    assert bytes(codec.decode(memoryview(bytes(codec.encode(symbols))), size)) == symbols


def test_codes_cost_little_more_than_their_entropy():
    symbols = (
        np.random.default_rng(0)
        .normal(0, 32, 1 << 17)
        .round()
        .clip(-127, 127)
        .astype(np.int8)
        .view(np.uint8)
    )
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    entropy = -(counts / symbols.size * np.log2(counts / symbols.size)).sum()
    assert 8 * len(ZSTD.encode(symbols)) / symbols.size < entropy + 0.09


def test_any_other_encoder_will_do():
    symbols = bytes(range(250)) * 40
    for level in (-5, 1, 9, 19):
        assert (
            ZSTD.decode(zstandard.ZstdCompressor(level=level).compress(symbols), len(symbols))
            == symbols
        )


@pytest.mark.parametrize(
    ("stored", "raw_bytes", "words"),
    [
        (b"", 5, "not a Zstandard frame"),
        (b"hello", 5, "not a Zstandard frame"),
        (b"\x28\xb5\x2f\xfd", 5, "Zstandard"),
        (b"\x50\x2a\x4d\x18\x00\x00\x00\x00", 0, "not a Zstandard frame"),
        (zstandard.ZstdCompressor().compress(b"12345"), 4, "wrong size"),
        (zstandard.ZstdCompressor().compress(b"12345"), 6, "wrong size"),
        (zstandard.ZstdCompressor().compress(b"12345") + b"\0", 5, "Zstandard"),
        (zstandard.ZstdCompressor().compress(b"12345")[:-1], 5, "Zstandard"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(b"12345"), 5, "wrong size"),
    ],
)
def test_what_is_refused(stored, raw_bytes, words):
    with pytest.raises(DecodeError, match=words):
        ZSTD.decode(stored, raw_bytes)


def test_a_frame_cannot_ask_for_more_memory():
    """17 bytes that declare 64 GiB."""
    frame = (
        bytes.fromhex("28b52ffde0") + (1 << 36).to_bytes(8, "little") + bytes.fromhex("01000000")
    )
    assert zstandard.get_frame_parameters(frame).content_size == 1 << 36
    with pytest.raises(DecodeError, match="wrong size"):
        ZSTD.decode(frame, 1000)


def _frame_with_window(window_log: int) -> bytes:
    """A frame of five literal bytes whose header asks for a window of 2^window_log bytes."""
    descriptor = bytes(
        [0b10_0_0_0_0_00, (window_log - 10) << 3]
    )  # four bytes of content size, window descriptor
    block = (1 | 0 << 1 | 5 << 3).to_bytes(3, "little") + b"12345"  # last block, raw, five bytes
    return b"\x28\xb5\x2f\xfd" + descriptor + (5).to_bytes(4, "little") + block


def test_windows_up_to_the_limit():
    assert limits.ZSTD_WINDOW_BYTES == 1 << 23
    assert ZSTD.decode(_frame_with_window(23), 5) == b"12345"
    for window_log in (24, 27, 31, 41):
        with pytest.raises(DecodeError, match=r"window|too much memory"):
            ZSTD.decode(_frame_with_window(window_log), 5)


def test_a_checksum_inside_a_frame_is_compared():
    frame = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(b"12345" * 9))
    assert ZSTD.decode(bytes(frame), 45) == b"12345" * 9
    frame[-1] ^= 1
    with pytest.raises(DecodeError, match="Zstandard"):
        ZSTD.decode(bytes(frame), 45)


def test_every_bit_of_a_frame_gives_the_declared_size_or_an_error():
    """Without the checksum of the slot a decoder cannot tell right from wrong.

    Here only size and type of error are judged.
    """
    symbols = np.random.default_rng(4).normal(0, 3, 600).astype(np.int8).tobytes()
    frame, silent = ZSTD.encode(symbols), 0
    for position in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[position // 8] ^= 1 << position % 8
        try:
            decoded = ZSTD.decode(bytes(damaged), len(symbols))
        except DecodeError:
            continue
        assert len(decoded) == len(symbols)
        silent += decoded != symbols
    assert silent > 100, "the reason for the checksum of every slot is gone?"


def test_every_cut_of_a_frame_is_refused():
    frame = ZSTD.encode(bytes(range(200)) * 5)
    for length in range(len(frame)):
        with pytest.raises(DecodeError):
            ZSTD.decode(frame[:length], 1000)


def test_raw_gives_back_the_same_bytes():
    assert bytes(RAW.encode(b"\0\xff")) == b"\0\xff" == RAW.decode(b"\0\xff", 2)


def test_raw_refuses_another_size():
    with pytest.raises(DecodeError, match="wrong size"):
        RAW.decode(b"123", 4)


def test_codecs_are_shared_between_threads():
    symbols = [
        np.random.default_rng(i).integers(0, 9, 50_000, dtype=np.uint8).tobytes() for i in range(8)
    ]
    failures = []

    def work(data):
        for _ in range(20):
            if ZSTD.decode(ZSTD.encode(data), len(data)) != data:
                failures.append(data)

    threads = [threading.Thread(target=work, args=(data,)) for data in symbols]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_few_frames_are_decoded_as_many_are(monkeypatch):
    """One by one and by one call: whole frames, a wrong size, a damaged frame."""
    rng = np.random.default_rng(8)
    parts = [rng.normal(120, 2, size).astype(np.uint8).tobytes() for size in (900, 1, 3000)]
    frames = [ZSTD.encode(part) for part in parts]
    ends = np.cumsum([len(frame) for frame in frames]).tolist()
    spans = [(end - len(frame), len(frame)) for end, frame in zip(ends, frames, strict=True)]
    sizes = [len(part) for part in parts]
    whole, damaged = b"".join(frames), bytearray(b"".join(frames))
    damaged[spans[0][0] + 30] ^= 0xFF
    cases = [(whole, sizes), (whole, [900, 2, 3000]), (bytes(damaged), sizes)]

    def outcomes():
        for data, raw_bytes in cases:
            found = ZSTD.decompress_together(memoryview(data), spans, raw_bytes)
            yield found if found is None else [bytes(symbols) for symbols in found]

    many = list(outcomes())
    monkeypatch.setattr(zstd, "_FEW_FRAMES", 9)
    assert many == list(outcomes())
    assert many[0] == parts
    assert many[1] is None
