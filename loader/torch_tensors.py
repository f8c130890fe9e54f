"""From tensors of a container to torch tensors: element types, allocation, and the jobs that fill them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.checksums import xxh3_hex
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import ChecksumError, TruncatedError, UnsupportedEnvironmentError
from codecllm.formats.files import SafeFile
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.loader.host.decode import (
    CODES,
    Workspace,
    decode_tiles,
    payload_span,
    plan_jobs,
    tiles_of,
    write_tile,
)
from codecllm.loader.host.memory import empty_bytes, tensor_over

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Element types of the container that torch has; F8_E8M0 is added where this torch knows it."""
if hasattr(torch, "float8_e8m0fnu"):
    TORCH_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_INT8_TARGETS = frozenset({"BF16", "F16", "F32"})

ANNOUNCED_BYTES = 32 << 20
"""How far ahead of what is decoded the kernel is asked to read."""

Allocate = Callable[[int], NDArray[np.uint8]]
"""Returns uninitialised memory, uint8 of so many bytes, contiguous and aligned as a tensor of them has to be."""


def torch_dtype(name: str, tensor: str | None = None) -> torch.dtype:
    """Returns torch's dtype for an element type of the container.

    Raises:
        UnsupportedEnvironmentError: this torch has none.
    """
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise UnsupportedEnvironmentError(
            f"torch {torch.__version__} has no dtype for {name}", tensor=tensor
        )
    return dtype


def is_model_float(name: str) -> bool:
    """Whether an element type of the container is a float that models compute with (not an 8-bit or smaller one)."""
    return name in ("BF16", "F16", "F32", "F64")


def words_of(tensor: torch.Tensor, rows: int, cols: int) -> NDArray[Any]:
    """Returns a contiguous tensor's memory as unsigned numpy words [rows, cols] of its element size."""
    flat = tensor.view(-1)
    numpy_bytes: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return numpy_bytes.view(f"<u{tensor.dtype.itemsize}").reshape(rows, cols)


@dataclass(frozen=True, slots=True)
class Run:
    """Part of a tensor under construction: bytes of a shard that lie together, and what is made of them.

    Attributes:
        source: the tensor in the container.
        tiles: the tiles whose slots they are; None: the whole of a plain tensor.
        decode: checks the bytes and puts what they mean into the tensor; raises FormatError where they are damaged.
        place: where the bytes are to be read to; None: into any buffer, for they are not kept.
    """

    source: PlainTensor | StoredTensor
    tiles: range | None
    decode: Callable[[memoryview, Workspace], None]
    place: memoryview | None = None

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return _span(self.source, self.tiles)[1]

    def read(self, buffer: bytearray) -> memoryview:
        """Reads the bytes, unchecked, into their place or the head of `buffer` (large enough); returns where they lie."""
        offset, size = _span(self.source, self.tiles)
        view = self.place if self.place is not None else memoryview(buffer)[:size]
        try:
            self.source.file.read_into(offset, view)
        except TruncatedError as exc:
            chunk = (
                self.tiles.start * self.source.table.planes
                if isinstance(self.source, StoredTensor) and self.tiles
                else None
            )
            raise exc.located(tensor=self.source.record.name, chunk=chunk) from None
        return view


@dataclass(frozen=True, slots=True)
class Filling:
    """A tensor under construction: `tensor` is complete and valid once every run of `runs` was decoded without an error."""

    tensor: torch.Tensor
    runs: list[Run]


def start_filling(
    source: PlainTensor | StoredTensor,
    dtype: torch.dtype | None,
    allocate: Allocate = empty_bytes,
) -> Filling:
    """Allocates a tensor and plans the runs that fill it.

    Args:
        source: the tensor in the container, side data already checked.
        dtype: the tensor's dtype; None takes the source's. An `int8` tensor is rounded once from float32 to it; others are
            decoded to the source's dtype and then cast by torch.
        allocate: returns memory for it, uint8 of so many bytes, uninitialised.

    Raises:
        UnsupportedEnvironmentError: torch lacks the source's dtype.
    """
    record = source.record
    own = torch_dtype(record.dtype, record.name)
    wanted = dtype or own
    memory = allocate(record.elements * wanted.itemsize)
    out = tensor_over(memory, tuple(record.shape), wanted)
    if isinstance(source, PlainTensor):
        return Filling(out, [_plain_run(source, out, memory)])
    native = DTYPE_NAMES.get(wanted, "")
    target = (
        record.dtype
        if not isinstance(record, Int8Tensor)
        else native
        if native in _INT8_TARGETS
        else "F32"
    )
    if TORCH_DTYPES[target] != wanted:
        return Filling(out, _cast_runs(source, out, target))
    return Filling(out, _coded_runs(source, memory, wanted, target))


def start_filling_codes(source: StoredTensor, allocate: Allocate = empty_bytes) -> Filling:
    """Allocates an int8 tensor of the source's shape and plans the runs that fill it with the codes."""
    memory = allocate(source.record.elements)
    return Filling(
        tensor_over(memory, tuple(source.record.shape), torch.int8),
        _coded_runs(source, memory, torch.int8, CODES),
    )


def start_keeping(source: StoredTensor) -> Filling:
    """Allocates uint8 [payload bytes] and plans the runs that fill it with the payload as it is stored, every chunk checked."""
    memory = empty_bytes(int(source.table.offsets[-1]))
    payload, runs = memoryview(memory), []
    for tiles in plan_jobs(source):
        offset, size = payload_span(source, tiles)
        begin = offset - source.offset
        runs.append(
            Run(source, tiles, partial(_check_chunks, source, tiles), payload[begin : begin + size])
        )
    return Filling(torch.from_numpy(memory), runs)


def open_scales(container: Container, name: str, of_columns: bool = False) -> torch.Tensor:
    """Returns the scales of an `int8` tensor, float32 [channels], or those of its columns [cols]; a copy of its own."""
    source = container.tensor(name)
    assert isinstance(source, StoredTensor) and source.scales is not None
    if not of_columns:
        return torch.from_numpy(source.scales.copy())
    assert source.columns is not None
    return torch.from_numpy(source.columns.scales.copy())


def _plain_run(source: PlainTensor, out: torch.Tensor, memory: NDArray[np.uint8]) -> Run:
    own, target = torch_dtype(source.record.dtype, source.record.name), out
    if out.dtype != own:
        memory = empty_bytes(source.record.source_bytes)
        target = tensor_over(memory, tuple(out.shape), own)
    place = memoryview(memory)

    def check(data: memoryview, workspace: Workspace) -> None:
        got = xxh3_hex(data)
        if got != source.record.xxh3:
            where: dict[str, Any] = {
                "file": source.file.name,
                "tensor": source.record.name,
                "byte": source.offset,
            }
            expected = source.record.xxh3
            raise ChecksumError(
                "stored bytes differ from the manifest: xxh3", got=got, expected=expected, **where
            )
        if target is not out:
            out.copy_(target)

    return Run(source, None, check, place)


def _coded_runs(
    source: StoredTensor, memory: NDArray[np.uint8], dtype: torch.dtype, target: str
) -> list[Run]:
    grid = source.table.grid
    words = memory.view(f"<u{dtype.itemsize}").reshape(grid.rows, grid.cols)
    return [
        Run(source, tiles, partial(decode_tiles, source, tiles, words, target))
        for tiles in plan_jobs(source)
    ]


def _cast_runs(source: StoredTensor, out: torch.Tensor, target: str) -> list[Run]:
    matrix = out.view(source.table.grid.rows, source.table.grid.cols)
    return [
        Run(source, tiles, partial(_decode_cast, source, tiles, matrix, target))
        for tiles in plan_jobs(source)
    ]


def _decode_cast(
    source: StoredTensor,
    tiles: range,
    out: torch.Tensor,
    target: str,
    slots: memoryview,
    workspace: Workspace,
) -> None:
    """Decodes tiles to `target` and casts each into its place in `out` [rows, cols]."""
    for tile, planes in tiles_of(source, tiles, slots, workspace):
        words = np.empty((tile.rows, tile.cols), word_dtype(DTYPES[target]))
        write_tile(source, tile, planes, words, target, workspace)
        values = torch.from_numpy(words.view(np.uint8)).view(TORCH_DTYPES[target])
        out[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols].copy_(values)


def _check_chunks(
    source: StoredTensor, tiles: range, slots: memoryview, workspace: Workspace
) -> None:
    first, last = tiles.start * source.table.planes, tiles.stop * source.table.planes
    for chunk in range(first, last):
        source.stored_chunk(chunk, slots, first)


def _span(source: PlainTensor | StoredTensor, tiles: range | None) -> tuple[int, int]:
    """Returns offset and size, in bytes of the shard, of some tiles of a tensor, or of all of it."""
    if isinstance(source, PlainTensor):
        return source.offset, source.record.source_bytes
    return payload_span(source, tiles if tiles is not None else range(len(source.table.grid)))


class Announcer:
    """Asks the kernel to fetch from the disk what will be read next, while earlier tensors are decoded. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: dict[str, tuple[int, int]] = {}

    def __call__(self, source: PlainTensor | StoredTensor) -> None:
        """Announces a tensor that is read now, and what follows it in its file."""
        offset, size = _span(source, None)
        if not (size and isinstance(source.file, SafeFile) and hasattr(os, "posix_fadvise")):
            return
        name, needed = source.file.name, offset + size + ANNOUNCED_BYTES // 2
        with self._lock:
            begin, end = self._windows.get(name, (0, 0))
            if not begin <= offset <= end:
                begin = end = offset
            upto = end if end >= needed else needed + ANNOUNCED_BYTES // 2
            self._windows[name] = begin, upto
        if upto > end:
            with source.file.opened() as descriptor:
                os.posix_fadvise(descriptor, end, upto - end, os.POSIX_FADV_WILLNEED)


def file_order(container: Container) -> Iterator[str]:
    """Yields the names of all stored tensors of a container in the order in which the shards hold them; no aliases."""
    for number in range(len(container.manifest.shards)):
        _, header = container.shard(number)
        for name in header.tensors:
            if name in container.records:
                yield name
