"""From tensors of a container to torch tensors: element types, allocation, and the jobs that fill them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.checksums import xxh3_hex
from codecllm.formats.container import Container, PlainTensor, StoredTensor
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import ChecksumError, UnsupportedEnvironmentError
from codecllm.formats.files import SafeFile
from codecllm.formats.manifest import Int8Tensor
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.loader.decode import CODES, Workspace, decode_tiles, payload_span, plan_jobs, read_tiles, write_tile
from codecllm.loader.memory import empty_tensor
from codecllm.loader.pool import DecodePool, Job

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


def torch_dtype(name: str, tensor: str | None = None) -> torch.dtype:
    """Returns torch's dtype for an element type of the container.

    Raises:
        UnsupportedEnvironmentError: this torch has none.
    """
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise UnsupportedEnvironmentError(f"torch {torch.__version__} has no dtype for {name}", tensor=tensor)
    return dtype


def words_of(tensor: torch.Tensor, rows: int, cols: int) -> NDArray[Any]:
    """Returns a contiguous tensor's memory as unsigned numpy words [rows, cols] of its element size."""
    flat = tensor.view(-1)
    numpy_bytes: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return numpy_bytes.view(f"<u{tensor.dtype.itemsize}").reshape(rows, cols)


@dataclass(frozen=True, slots=True)
class Filling:
    """A tensor under construction: `tensor` is complete and valid once every job of `jobs` has run without an error."""

    tensor: torch.Tensor
    jobs: list[Job]


def start_filling(
    source: PlainTensor | StoredTensor,
    dtype: torch.dtype | None,
    allocate: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] = empty_tensor,
) -> Filling:
    """Allocates a tensor and plans the jobs that fill it.

    Args:
        source: the tensor in the container, side data already checked.
        dtype: the tensor's dtype; None takes the source's. An `int8` tensor is rounded once from float32 to it; others are
            decoded to the source's dtype and then cast by torch.
        allocate: makes the uninitialised tensor.

    Raises:
        UnsupportedEnvironmentError: torch lacks the source's dtype.
    """
    record = source.record
    own = torch_dtype(record.dtype, record.name)
    out = allocate(tuple(record.shape), dtype or own)
    if isinstance(source, PlainTensor):
        return Filling(out, [lambda workspace: read_plain(source, out)])
    native = DTYPE_NAMES.get(out.dtype, "")
    if not isinstance(record, Int8Tensor):
        return Filling(out, _coded_jobs(source, out, record.dtype, cast=out.dtype != own))
    return Filling(out, _coded_jobs(source, out, native if native in _INT8_TARGETS else "F32", native not in _INT8_TARGETS))


def start_filling_codes(source: StoredTensor) -> Filling:
    """Allocates an int8 tensor of the source's shape and plans the jobs that fill it with the codes."""
    out = empty_tensor(tuple(source.record.shape), torch.int8)
    return Filling(out, _coded_jobs(source, out, CODES, cast=False))


def read_plain(source: PlainTensor, out: torch.Tensor) -> None:
    """Reads a plainly stored tensor into `out` [shape], casting where the dtypes differ.

    Raises:
        ChecksumError: the bytes differ from the manifest.
    """
    own = torch_dtype(source.record.dtype, source.record.name)
    target = out if out.dtype == own else empty_tensor(tuple(out.shape), own)
    if out.numel() == 0:
        source.read()
        return
    data = target.view(-1).view(torch.uint8).numpy()
    source.file.read_into(source.offset, memoryview(data))
    got = xxh3_hex(data)
    if got != source.record.xxh3:
        place: dict[str, Any] = {"file": source.file.name, "tensor": source.record.name, "byte": source.offset}
        raise ChecksumError("stored bytes differ from the manifest: xxh3", got=got, expected=source.record.xxh3, **place)
    if target is not out:
        out.copy_(target)


def fill(pool: DecodePool, filling: Filling) -> torch.Tensor:
    """Runs all jobs of a filling and returns its tensor; raises what the first failing job raised."""
    pool.run_all(filling.jobs)
    return filling.tensor


def open_scales(container: Container, name: str, of_columns: bool = False) -> torch.Tensor:
    """Returns the scales of an `int8` tensor, float32 [channels], or those of its columns [cols]; a copy of its own."""
    source = container.tensor(name)
    assert isinstance(source, StoredTensor) and source.scales is not None
    if not of_columns:
        return torch.from_numpy(source.scales.copy())
    assert source.columns is not None
    return torch.from_numpy(source.columns.scales.copy())


def _coded_jobs(source: StoredTensor, out: torch.Tensor, target: str, cast: bool) -> list[Job]:
    grid = source.table.grid
    if cast:
        matrix = out.view(grid.rows, grid.cols)
        return [partial(_decode_cast, source, tiles, matrix, target) for tiles in plan_jobs(source)]
    words = words_of(out, grid.rows, grid.cols)
    return [partial(decode_tiles, source, tiles, words, target) for tiles in plan_jobs(source)]


def _decode_cast(source: StoredTensor, tiles: range, out: torch.Tensor, target: str, workspace: Workspace) -> None:
    """Decodes tiles to `target` and casts each into its place in `out` [rows, cols]."""
    for tile, planes in read_tiles(source, tiles, workspace):
        words = np.empty((tile.rows, tile.cols), word_dtype(DTYPES[target]))
        write_tile(source, tile, planes, words, target, workspace)
        values = torch.from_numpy(words.view(np.uint8)).view(TORCH_DTYPES[target])
        out[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols].copy_(values)


def announce_reads(source: PlainTensor | StoredTensor, tiles: range | None = None) -> None:
    """Asks the kernel to fetch what a tensor's next jobs will read, while earlier ones decode."""
    if isinstance(source, PlainTensor):
        offset, size = source.offset, source.record.source_bytes
    else:
        offset, size = payload_span(source, tiles if tiles is not None else range(len(source.table.grid)))
    if size and isinstance(source.file, SafeFile) and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(source.file.descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def file_order(container: Container) -> Iterator[PlainTensor | StoredTensor]:
    """Opens every stored tensor of a container, in the order in which the shards hold them; aliases are left out."""
    for number in range(len(container.manifest.shards)):
        _, header = container.shard(number)
        for name in header.tensors:
            if name in container.records:
                yield container.tensor(name)
