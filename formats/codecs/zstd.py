"""Codec `zstd`: a standard Zstandard frame (RFC 8878) a chunk, for symbols without repetition.

Weights have a skewed distribution but hardly a repeated string, so the gain is all in the literals'
Huffman code and every match that is found costs more than it saves. Strategy `fast` with min_match
7 and a hash table of 64 entries finds almost none: 0.05 to 0.08 bit above the order-0 entropy,
where levels 1 to 19 waste up to 0.5 bit on low-entropy symbols.

The high plane of wide codes is another matter where their low plane holds most bits: nearly all of
it is zero, and runs of zeros are matches. `btultra` chooses them by their cost: 0.078 bit a
symbol where `fast` takes 0.128 and the order-0 entropy is 0.121, at a thirtieth of the speed.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from codecllm.formats import limits
from codecllm.formats.errors import DecodeError

_MAGIC = (0xFD2FB528).to_bytes(4, "little")
_RUN_LENGTH_BLOCK = 1
_SPAN = struct.Struct("=QQ")
HEAD_BYTES = 14
"""Longest header of a frame without dictionary."""

_FEW_FRAMES = 2
"""So many are decoded one by one: the call for many costs 10 microseconds before the first."""

SPARSE_LOW_BITS = 5
"""High planes of chunks with that many `low_bits` or more may be nearly constant."""

SPARSE_SHARE = 512
"""Such a plane whose frame is longer than 1/512 of it is packed with strategy `btultra` too."""


def _parameters(strategy: int, **sizes: int) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(
        window_log=17,
        strategy=strategy,
        write_content_size=True,
        # The chunk record has a checksum already.
        write_checksum=False,
        write_dict_id=False,
        # Compression in several threads would change the bytes of a frame.
        threads=0,
        **sizes,
    )


_PARAMETERS = _parameters(
    zstandard.STRATEGY_FAST, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0
)
_SPARSE_PARAMETERS = _parameters(
    zstandard.STRATEGY_BTULTRA,
    hash_log=17,
    chain_log=17,
    search_log=4,
    min_match=4,
    target_length=64,
)


class _ThreadState(threading.local):
    """Compressors and a decompressor per thread: none may be shared."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.sparse = zstandard.ZstdCompressor(compression_params=_SPARSE_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=limits.ZSTD_WINDOW_BYTES)


_STATE = _ThreadState()


class ZstdCodec:
    """Stores a plane as one Zstandard frame with content size, without dictionary and checksum."""

    codec_id = 1
    name = "zstd"

    def encode(self, raw: Any) -> bytes:
        """Returns one frame; deterministic for one version of libzstd.

        Examples:
            >>> frame = ZstdCodec().encode(bytes(1000))
            >>> frame[:4].hex(), ZstdCodec().decode(frame, 1000) == bytes(1000)
            ('28b52ffd', True)
        """
        return _STATE.compressor.compress(raw)

    def encode_sparse(self, raw: Any) -> bytes:
        """Returns one frame of symbols that are nearly all equal, as in most high planes."""
        frame = self.encode(raw)
        if SPARSE_SHARE * len(frame) <= memoryview(raw).nbytes:
            return frame
        return min(frame, _STATE.sparse.compress(raw), key=len)

    def encode_together(self, raw: Any, sizes: Sequence[int]) -> list[memoryview]:
        """Encodes chunks that follow one another in memory, without the interpreter's lock.

        Args:
            raw: bytes-like, C-contiguous.
            sizes: bytes of each chunk, 1 or more, all of `raw` together.

        Returns:
            The frame of each, as `encode` makes it.

        Examples:
            >>> [bytes(frame) for frame in ZstdCodec().encode_together(b"aab", [2, 1])] == [
            ...     ZstdCodec().encode(b"aa"), ZstdCodec().encode(b"b")]
            True
        """
        begins = itertools.accumulate(sizes, initial=0)
        spans = b"".join(map(_SPAN.pack, begins, sizes))
        segments = zstandard.BufferWithSegments(raw, spans)
        frames: Any = _STATE.compressor.multi_compress_to_buffer(segments, threads=0)
        return [memoryview(frame) for frame in frames]

    def decode(self, stored: Any, raw_bytes: int) -> bytes:
        """Decodes one frame whose size was declared elsewhere.

        The frame's own size is compared with `raw_bytes` before anything is allocated, so a frame
        cannot ask for more memory.

        Raises:
            DecodeError: not exactly one standard frame of `raw_bytes` bytes, or the frame is
                damaged.
        """
        check_frame(stored, raw_bytes)
        try:
            symbols = _STATE.decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as exc:
            raise DecodeError(f"Zstandard: {exc}") from exc
        if len(symbols) != raw_bytes:
            raise DecodeError("frame decodes to a wrong size", got=len(symbols), expected=raw_bytes)
        return symbols

    def decode_together(
        self, frames: memoryview, spans: list[tuple[int, int]], raw_bytes: list[int]
    ) -> list[memoryview] | None:
        """Decodes frames in one piece of memory by one call without the interpreter's lock.

        Args:
            frames: the memory.
            spans: where each frame begins in it, and its size; one or more.
            raw_bytes: the size that each decodes to.

        Returns:
            The bytes of each, or None where `decode` might refuse one: it is for the caller to find
            which, and why.
        """
        try:
            if len(spans) == 1:
                ((begin, size),) = spans
                return [memoryview(self.decode(frames[begin : begin + size], raw_bytes[0]))]
            for (begin, size), raw in zip(spans, raw_bytes, strict=True):
                check_frame(frame := frames[begin : begin + size], raw)
                if not _is_one_frame(frame):
                    return None
            return self.decompress_together(frames, spans, raw_bytes)
        except DecodeError:
            return None

    def decompress_together(
        self, frames: memoryview, spans: list[tuple[int, int]], raw_bytes: list[int]
    ) -> list[memoryview] | None:
        """As `decode_together`, for frames whose headers and ends were checked before."""
        if len(spans) <= _FEW_FRAMES:
            return self._decompress_each(frames, spans, raw_bytes)
        numbers = [number for span in spans for number in span]
        segments = zstandard.BufferWithSegments(frames, struct.pack(f"={len(numbers)}Q", *numbers))
        sizes = struct.pack(f"={len(raw_bytes)}Q", *raw_bytes)
        try:
            buffers: Any = _STATE.decompressor.multi_decompress_to_buffer(
                segments, decompressed_sizes=sizes, threads=1
            )
        except zstandard.ZstdError:
            return None
        return [memoryview(symbols) for symbols in buffers]

    def _decompress_each(
        self, frames: memoryview, spans: list[tuple[int, int]], raw_bytes: list[int]
    ) -> list[memoryview] | None:
        decompress = _STATE.decompressor.decompress
        try:
            chunks = [
                decompress(frames[begin : begin + size], allow_extra_data=False)
                for begin, size in spans
            ]
        except zstandard.ZstdError:
            return None
        if [len(symbols) for symbols in chunks] != raw_bytes:
            return None
        return [memoryview(symbols) for symbols in chunks]


def _header_bytes(descriptor: int) -> int:
    """Returns the size of a frame's header, magic number included, from its fifth byte."""
    single = descriptor >> 5 & 1
    return 6 - single + (single, 2, 4, 8)[descriptor >> 6] + (0, 1, 2, 4)[descriptor & 3]


def _is_one_frame(stored: memoryview) -> bool:
    """Whether the blocks of a frame end where its bytes end; `check_frame` accepted the header."""
    descriptor = stored[4]
    # A frame with a checksum has 4 bytes more: left to the slow path.
    if descriptor & 4:
        return False
    at, last = _header_bytes(descriptor), 0
    while not last:
        if at + 3 > len(stored):
            return False
        block = stored[at] | stored[at + 1] << 8 | stored[at + 2] << 16
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        at += 3 + (1 if kind == _RUN_LENGTH_BLOCK else size)
    return at == len(stored)


def check_frame(stored: Any, raw_bytes: int) -> None:
    """Checks the header of a frame before a decoder sees it.

    Raises:
        DecodeError: it is not that of a standard frame of `raw_bytes` bytes, or asks for a
            dictionary or too large a window.
    """
    if bytes(stored[:4]) != _MAGIC:
        raise DecodeError("not a Zstandard frame", got=bytes(stored[:4]).hex())
    try:
        parameters = zstandard.get_frame_parameters(stored)
    except zstandard.ZstdError as exc:
        raise DecodeError(f"Zstandard: {exc}") from exc
    if parameters.content_size != raw_bytes:
        raise DecodeError(
            "frame declares a wrong size", got=parameters.content_size, expected=raw_bytes
        )
    if parameters.dict_id or parameters.window_size > limits.ZSTD_WINDOW_BYTES:
        raise DecodeError(
            "frame needs a dictionary or too large a window", got=parameters.window_size
        )


def are_alike(heads: NDArray[np.uint8], raw_bytes: NDArray[np.int64]) -> bool:
    """Whether `check_frame` judges all frames as it judges the first; arguments of `are_plain`."""
    descriptor = int(heads[0, 4])
    length = _header_bytes(descriptor)
    head = heads[:, : min(length, HEAD_BYTES)]
    return (
        length <= HEAD_BYTES
        and bool((head == head[0]).all())
        and bool((raw_bytes == raw_bytes[0]).all())
    )


def are_plain(heads: NDArray[np.uint8], raw_bytes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns bool [n]: whether `check_frame` certainly accepts each frame, by its first bytes.

    Args:
        heads: uint8 [n, HEAD_BYTES], the first bytes of each (of a shorter one, with the bytes that
            follow it).
        raw_bytes: int64 [n], the size that each has to declare.
    """
    descriptor = heads[:, 4]
    single = (descriptor & 0x20) != 0
    exponent, eighths = (heads[:, 5] >> 3).astype(np.int64), (heads[:, 5] & 7).astype(np.int64)
    window = np.where(single, raw_bytes, (np.int64(8) + eighths) << (exponent + 7))
    size_at = np.where(single, 5, 6)
    size_bytes = np.choose(descriptor >> 6, [single.astype(np.int64), 2, 4, 8])
    places = size_at[:, None] + np.arange(8)
    digits = np.take_along_axis(heads, places, axis=1).astype(np.uint64)
    digits[np.arange(8) >= size_bytes[:, None]] = 0
    declared_sizes = (digits << (np.arange(8, dtype=np.uint64) * np.uint64(8))).sum(
        axis=1, dtype=np.uint64
    )
    # RFC 8878: a size of two bytes counts from 256.
    declared_sizes[size_bytes == 2] += np.uint64(256)
    magic = (heads[:, :4] == np.frombuffer(_MAGIC, np.uint8)).all(axis=1)
    simple = (descriptor & 0x1F) == 0  # no dictionary, no checksum, nothing reserved
    fits = (
        (declared_sizes == raw_bytes.astype(np.uint64))
        & (window <= limits.ZSTD_WINDOW_BYTES)
        & (size_bytes > 0)
    )
    plain: NDArray[np.bool_] = magic & simple & fits
    return plain
