"""Floors: the necessary work as a bare loop over the same bytes, without a container."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from codecllm.converter.encode.quantize import quantize_block, row_absmax
from codecllm.converter.source.source import SourceModel
from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.checksums import sha256_of_descriptor
from codecllm.formats.codecs import CODECS
from codecllm.formats.codecs.zstd import ZstdCodec
from codecllm.formats.container import Container
from codecllm.formats.files import SafeFile
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.int8 import channel_scales
from codecllm.formats.stored_tensor import StoredTensor, scales_for_tile

_TILE = 1 << 17
_BLOCK = 1 << 20
_RUN = 8
"""Tiles of one read."""
Item = TypeVar("Item")


def convert_floor(source: Path, scratch: Path, workers: int) -> float:
    """Seconds to read, quantize, zstd-encode, hash and write all matrices, then to hash the file.

    The same kernels and hashes as the converter: sha256 of the codes, xxh3-64 of every frame,
    sha256 of the file. Matrices are bf16 with rows that divide 128 Ki. Frames are written in any
    order, nothing of a container is.
    """
    start = time.perf_counter()
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
    return time.perf_counter() - start


def quantize_seconds(elements: int = 1 << 24) -> float:
    """Seconds for one core to quantize `elements` bf16 weights in memory (scales and codes)."""
    words = _gaussian_words(elements)
    codes = np.empty((256, 4096), np.int8)
    start = time.perf_counter()
    for row in range(0, len(words), 256):
        block = words[row : row + 256]
        quantize_block(
            block,
            "BF16",
            channel_scales(row_absmax(block, "BF16").absmax)[:, None],
            codes[: len(block)],
        )
    return time.perf_counter() - start


def _gaussian_words(elements: int) -> NDArray[np.uint16]:
    """Returns bf16 patterns [elements / 4096, 4096] of N(0, 1), truncated."""
    values = np.random.default_rng(0).standard_normal((elements // 4096, 4096), dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


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
    sizes = [min(_TILE, symbols.size - start) for start in range(0, symbols.size, _TILE)]
    frames = ZstdCodec().encode_together(symbols, sizes)
    for frame in frames:
        xxhash.xxh3_64_intdigest(frame)
    return frames


def _in_threads(
    workers: int,
    items: Iterator[Item],
    work: Callable[[Item], None],
    prepare: Callable[[], None] | None = None,
) -> None:
    lock = threading.Lock()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            if prepare is not None:
                prepare()
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


def load_floor(container: Path, workers: int, *, keep: bool = True) -> float:
    """Seconds to read every chunk's slot, hash it, zstd-decode it and turn it into bf16.

    int8: dequantize and round; lossless: join the two planes and rotate. The same kernels as the
    loader's, with nothing around them: nothing is planned, ordered or reported.

    Args:
        container: bf16 matrices, int8 or lossless, in tiles of whole rows.
        workers: threads.
        keep: put the result into memory of the tensors' size, as every loader must. False:
            overwrite one buffer of a tile, which stays in the cache; that is arithmetic alone, and
            no loader can do with so little.
    """
    with Container(container) as opened_container:
        start = time.perf_counter()
        _in_threads(
            workers, _runs(opened_container, keep), _decode_run, prepare=_single_torch_thread
        )
        return time.perf_counter() - start


def _runs(container: Container, keep: bool) -> Iterator[_Run]:
    """Cuts the coded tensors into runs of tiles; a tensor's memory lives until its last run."""
    for name in container.records:
        tensor = container.tensor(name)
        if isinstance(tensor, StoredTensor):
            grid = tensor.table.grid
            out = np.empty((grid.rows, grid.cols), np.uint16) if keep else None
            for first in range(0, len(grid), _RUN):
                yield _Run(tensor, out, first, min(first + _RUN, len(grid)))


def whole_tensor_quantize_seconds(elements: int = 1 << 24) -> float:
    """Seconds for one core to quantize by whole-tensor float32 expressions in torch."""
    weights = torch.from_numpy(_gaussian_words(elements)).view(torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    values = weights.float()
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    torch.round(values / scale).clamp(-127, 127).to(torch.int8)
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return seconds


@dataclass(frozen=True, slots=True)
class _Run:
    """Tiles [first, last) of a tensor, and the uint16 matrix that they go to (None: a buffer)."""

    tensor: StoredTensor
    out: NDArray[np.uint16] | None
    first: int
    last: int


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.slots = bytearray(4 * _RUN * _TILE)
        self.floats, self.sign, self.out = (
            np.empty(_TILE, np.float32),
            np.empty(_TILE, np.uint16),
            np.empty(_TILE, np.uint16),
        )


_BUFFERS = _Buffers()


def _decode_run(run: _Run) -> None:
    table, record, planes = run.tensor.table, run.tensor.record, run.tensor.table.planes
    begin, end = int(table.offsets[run.first * planes]), int(table.offsets[run.last * planes])
    view = memoryview(_BUFFERS.slots)[: end - begin]
    run.tensor.file.read_into(run.tensor.offset + begin, view)
    for index in range(run.first, run.last):
        tile = table.grid.tile(index)
        symbols = []
        for chunk in range(index * planes, (index + 1) * planes):
            slot = view[int(table.offsets[chunk]) - begin : int(table.offsets[chunk + 1]) - begin]
            xxhash.xxh3_64_intdigest(slot)
            payload = slot[: int(table.records["stored_bytes"][chunk])]
            codec = CODECS[int(table.records["codec"][chunk])]
            symbols.append(
                np.frombuffer(codec.decode(payload, tile.symbols), np.uint8).reshape(
                    tile.rows, tile.cols
                )
            )
        if run.out is not None:
            out = run.out[tile.row : tile.row + tile.rows]
        else:
            out = _BUFFERS.out[: tile.symbols].reshape(tile.rows, tile.cols)
        if isinstance(record, Int8Tensor):
            assert run.tensor.scales is not None
            _dequantize(
                symbols[0].view(np.int8), scales_for_tile(record, run.tensor.scales, tile), out
            )
        else:
            _join(symbols, out)


def _dequantize(
    codes: NDArray[np.int8], scales: NDArray[np.float32], out: NDArray[np.uint16]
) -> None:
    values = _BUFFERS.floats[: codes.size].reshape(codes.shape)
    np.copyto(values, codes)
    np.multiply(values, scales, out=values)
    torch.from_numpy(out).view(torch.bfloat16).copy_(torch.from_numpy(values))


def _join(symbols: list[NDArray[np.uint8]], out: NDArray[np.uint16]) -> None:
    sign = _BUFFERS.sign[: out.size].reshape(out.shape)
    np.copyto(out, symbols[0])
    np.left_shift(out, 8, out=out)
    np.bitwise_or(out, symbols[1], out=out)
    np.left_shift(out, 15, out=sign)
    np.right_shift(out, 1, out=out)
    np.bitwise_or(out, sign, out=out)


def _single_torch_thread() -> None:
    torch.set_num_threads(1)
