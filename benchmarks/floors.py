"""Floors: the work that no implementation can leave out, as a bare loop over the same bytes, without a container around it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from codecllm.converter.quantize import quantize_block, row_absmax
from codecllm.converter.source import SourceModel, SourceTensor
from codecllm.formats.checksums import sha256_of_descriptor
from codecllm.formats.codecs import CODEC_IDS, CODECS
from codecllm.formats.files import SafeFile
from codecllm.formats.schemes.int8 import channel_scales

_ZSTD = CODECS[CODEC_IDS["zstd"]]
_TILE = 1 << 17
_BLOCK = 1 << 20
Item = TypeVar("Item")


def convert_floor(source: Path, scratch: Path, workers: int) -> float:
    """Seconds to read, quantize, zstd-encode, hash and write all matrices, then to read the result again for its sha256.

    The same kernels and hashes as the converter: sha256 of the codes, xxh3-64 of every frame, sha256 of the file. Matrices are
    bf16 with rows that divide 128 Ki. Frames are written in any order, nothing of a container is.
    """
    started = time.perf_counter()
    with SourceModel(source) as model, open(scratch, "wb", buffering=0) as file:
        write_lock = threading.Lock()

        def one(item: tuple[SourceTensor, int, int]) -> None:
            frames = _encode_rows(*item)
            with write_lock:
                for frame in frames:
                    file.write(frame)

        _in_threads(workers, _blocks(model), one)
    with SafeFile(scratch.parent, scratch.name) as again:
        sha256_of_descriptor(again.descriptor)
    return time.perf_counter() - started


def quantize_seconds(elements: int = 1 << 24) -> float:
    """Seconds for one core to quantize `elements` bf16 weights that lie in memory (scales and codes)."""
    random = np.random.default_rng(0)
    words = (random.standard_normal((elements // 4096, 4096), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    codes = np.empty((256, 4096), np.int8)
    started = time.perf_counter()
    for row in range(0, len(words), 256):
        block = words[row : row + 256]
        quantize_block(block, "BF16", channel_scales(row_absmax(block, "BF16").absmax)[:, None], codes[: len(block)])
    return time.perf_counter() - started


def _blocks(model: SourceModel) -> Iterator[tuple[SourceTensor, int, int]]:
    for tensor in model.tensors.values():
        rows, cols = tensor.shape
        step = _BLOCK // cols
        for row in range(0, rows, step):
            yield tensor, row, min(step, rows - row)


def _encode_rows(tensor: SourceTensor, row: int, rows: int) -> list[Any]:
    cols = tensor.shape[1]
    words = tensor.read_elements(row * cols, (row + rows) * cols).reshape(rows, cols)
    codes = np.empty((rows, cols), np.int8)
    quantize_block(words, "BF16", channel_scales(row_absmax(words, "BF16").absmax)[:, None], codes)
    symbols = codes.reshape(-1).view(np.uint8)
    hashlib.sha256(symbols)
    frames = []
    for start in range(0, symbols.size, _TILE):
        frame = _ZSTD.encode(symbols[start : start + _TILE])
        xxhash.xxh3_64_intdigest(frame)
        frames.append(frame)
    return frames


def _in_threads(workers: int, items: Iterator[Item], work: Callable[[Item], None]) -> None:
    lock = threading.Lock()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while not failures:
                with lock:
                    item = next(items, None)
                if item is None:
                    return
                work(item)
        except BaseException as exc:  # handed to the caller below
            failures.append(exc)

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
