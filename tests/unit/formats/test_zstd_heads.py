"""Many frame headers at once against the parser of libzstd."""

from __future__ import annotations

import numpy as np
import zstandard

from codecllm.formats.codecs.zstd import HEAD_BYTES, ZstdCodec, are_alike, are_plain, check_frame
from codecllm.formats.errors import DecodeError


def _accepted(frame, raw_bytes):
    try:
        check_frame(frame, raw_bytes)
    except DecodeError:
        return False
    return True


def _heads(frames):
    return np.stack(
        [np.frombuffer(frame[:HEAD_BYTES].ljust(HEAD_BYTES, b"\xff"), np.uint8) for frame in frames]
    )


def _frames():
    rng, frames, sizes = np.random.default_rng(0), [], []
    for size in (1, 200, 255, 256, 257, 65_535, 65_791, 65_792, 131_072, 1 << 20, 9 << 20):
        raw = rng.integers(0, 3, size).astype(np.uint8).tobytes()
        frames += [ZstdCodec().encode(raw), zstandard.ZstdCompressor(level=9).compress(raw)]
        parameters = zstandard.ZstdCompressionParameters(window_log=12, write_content_size=True)
        frames.append(zstandard.ZstdCompressor(compression_params=parameters).compress(raw))
        frames.append(zstandard.ZstdCompressor(write_content_size=False).compress(raw))
        frames.append(zstandard.ZstdCompressor(write_checksum=True).compress(raw))
        sizes += [size] * 5
    return frames, sizes


def test_whatever_is_called_plain_is_accepted_and_the_codecs_own_frames_are_plain():
    frames, sizes = _frames()
    plain = are_plain(_heads(frames), np.array(sizes, np.int64))
    for number, (frame, size) in enumerate(zip(frames, sizes, strict=True)):
        assert _accepted(frame, size) or not plain[number], (number, size)
        assert plain[number] or number % 5 or size > 8 << 20, size
    assert not are_plain(_heads(frames), np.array(sizes, np.int64) + 1).any()


def test_no_flip_in_a_header_is_called_plain_unless_libzstd_accepts_it():
    frames, sizes = _frames()
    flipped, raw_bytes = [], []
    for frame, size in zip(frames, sizes, strict=True):
        for bit in range(8 * min(len(frame), HEAD_BYTES)):
            changed = bytearray(frame[:64])
            changed[bit // 8] ^= 1 << bit % 8
            flipped.append(bytes(changed))
            raw_bytes.append(size)
    plain = are_plain(_heads(flipped), np.array(raw_bytes, np.int64))
    assert all(_accepted(flipped[number], raw_bytes[number]) for number in np.flatnonzero(plain))
    assert 0 < plain.sum() < len(flipped)


def test_frames_are_alike_only_where_libzstd_judges_them_alike():
    frames, sizes = _frames()
    for frame, size in zip(frames, sizes, strict=True):
        assert are_alike(_heads([frame, frame]), np.array([size, size]))
        assert not are_alike(_heads([frame, frame]), np.array([size, size + 1]))
        for bit in range(8 * min(len(frame), HEAD_BYTES)):
            changed = bytearray(frame)
            changed[bit // 8] ^= 1 << bit % 8
            if are_alike(_heads([frame, changed]), np.array([size, size])):
                assert _accepted(frame, size) == _accepted(bytes(changed), size), (size, bit)
