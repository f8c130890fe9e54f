"""Tensors under construction on the CPU: their memory, and the jobs that fill it.

A job reads one run of tiles, which lie together in the shard, into the buffer of its thread, checks
and decodes them, and writes their elements to their place in the tensor. The bytes stay in the
cache of the core that read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.checksums import check_xxh3
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import TruncatedError
from codecllm.formats.manifest.records import CodedTensor, Int8Tensor
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.formats.tile_run import CODES, WIDE_CODES
from codecllm.loader.engine import Request
from codecllm.loader.host.decode import (
    Workspace,
    decode_tiles,
    payload_span,
    plan_jobs,
    read_run,
    tiles_of,
    write_tile,
)
from codecllm.loader.host.memory import Allocate, empty_bytes, tensor_over
from codecllm.loader.host.workers import Job
from codecllm.loader.torch_tensors import DTYPE_NAMES, TORCH_DTYPES, torch_dtype

_INT8_TARGETS = frozenset({"BF16", "F16", "F32"})


@dataclass(frozen=True, slots=True)
class PendingTensor:
    """A tensor under construction.

    Attributes:
        tensor: complete and valid once every job has ended without an error.
        jobs: fill it; each raises FormatError where its part is damaged.
    """

    tensor: torch.Tensor
    jobs: list[Job]


def plan_tensor(
    source: PlainTensor | StoredTensor, request: Request, allocate: Allocate = empty_bytes
) -> PendingTensor:
    """Allocates a tensor and plans the jobs that fill it.

    Args:
        source: the tensor in the container, side data already checked.
        request: the part of it and the dtype.
        allocate: returns memory for it.

    Raises:
        UnsupportedEnvironmentError: torch lacks the source's dtype.
    """
    if request.part == "payload":
        assert isinstance(source, StoredTensor)
        return _plan_payload(source, request.out, allocate)
    if request.part == "codes":
        assert isinstance(source, StoredTensor)
        dtype, target = (torch.int16, WIDE_CODES) if source.wide else (torch.int8, CODES)
        memory = allocate(source.record.elements * dtype.itemsize)
        tensor = tensor_over(memory, tuple(source.record.shape), dtype)
        return PendingTensor(tensor, _coded_jobs(source, memory, dtype, target))
    return _plan_weight(source, request.dtype, allocate)


def _plan_weight(
    source: PlainTensor | StoredTensor, dtype: torch.dtype | None, allocate: Allocate
) -> PendingTensor:
    """Plans the elements as `dtype`; None takes the source's.

    An `int8` tensor is rounded once, from float32 to `dtype`. Others are decoded to the source's
    dtype and then cast by torch.
    """
    record = source.record
    stored_dtype = torch_dtype(record.dtype, record.name)
    dtype = dtype or stored_dtype
    memory = allocate(record.elements * dtype.itemsize)
    tensor = tensor_over(memory, tuple(record.shape), dtype)
    if isinstance(source, PlainTensor):
        return PendingTensor(tensor, [partial(_read_plain, source, memory, tensor, stored_dtype)])
    target = decoded_dtype(source.record, dtype)
    if TORCH_DTYPES[target] == dtype:
        return PendingTensor(tensor, _coded_jobs(source, memory, dtype, target))
    matrix = tensor.view(source.table.grid.rows, source.table.grid.cols)
    jobs: list[Job] = [
        partial(_decode_and_cast, source, tiles, matrix, target) for tiles in plan_jobs(source)
    ]
    return PendingTensor(tensor, jobs)


def decoded_dtype(record: CodedTensor, dtype: torch.dtype | None) -> str:
    """Returns the dtype to which a tensor is decoded before torch casts it to `dtype`, if needed.

    Other dtypes than three of an `int8` tensor are cast from float32, which holds every product.
    """
    if not isinstance(record, Int8Tensor):
        return record.dtype
    name = DTYPE_NAMES.get(dtype or TORCH_DTYPES[record.dtype], "")
    return name if name in _INT8_TARGETS else "F32"


def _plan_payload(
    source: StoredTensor, out: torch.Tensor | None, allocate: Allocate
) -> PendingTensor:
    """Plans the payload as it is stored, every chunk checked: uint8 [payload bytes]."""
    if out is None:
        out = torch.from_numpy(allocate(int(source.table.offsets[-1])))
    payload = memoryview(out.numpy())
    jobs: list[Job] = []
    for tiles in plan_jobs(source):
        offset, size = payload_span(source, tiles)
        begin = offset - source.offset
        jobs.append(partial(_read_payload, source, tiles, payload[begin : begin + size]))
    return PendingTensor(out, jobs)


def _coded_jobs(
    source: StoredTensor, memory: NDArray[np.uint8], dtype: torch.dtype, target: str
) -> list[Job]:
    grid = source.table.grid
    words = memory.view(f"<u{dtype.itemsize}").reshape(grid.rows, grid.cols)
    return [partial(_decode, source, tiles, words, target) for tiles in plan_jobs(source)]


def _decode(
    source: StoredTensor,
    tiles: range,
    words: NDArray[np.unsignedinteger],
    target: str,
    workspace: Workspace,
) -> None:
    slots = read_run(source, tiles, workspace)
    decode_tiles(source, tiles, words, target, slots, workspace)


def _decode_and_cast(
    source: StoredTensor, tiles: range, out: torch.Tensor, target: str, workspace: Workspace
) -> None:
    """Decodes tiles to `target` and casts each into its place in `out` [rows, cols]."""
    slots = read_run(source, tiles, workspace)
    for tile, planes in tiles_of(source, tiles, slots, workspace):
        # Not from the workspace: `write_tile` uses it for its own values.
        words = np.empty((tile.rows, tile.cols), word_dtype(DTYPES[target]))
        write_tile(source, tile, planes, words, target, workspace)
        values = torch.from_numpy(words.view(np.uint8)).view(TORCH_DTYPES[target])
        out[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols].copy_(values)


def _read_payload(
    source: StoredTensor, tiles: range, place: memoryview, workspace: Workspace
) -> None:
    first, last = tiles.start * source.table.planes, tiles.stop * source.table.planes
    try:
        source.file.read_into(payload_span(source, tiles)[0], place)
    except TruncatedError as exc:
        raise exc.located(tensor=source.record.name, chunk=first) from None
    # Checked now: the payload is decoded much later, at each use of the weight.
    for chunk in range(first, last):
        source.stored_chunk(chunk, place, first)


def _read_plain(
    source: PlainTensor,
    memory: NDArray[np.uint8],
    tensor: torch.Tensor,
    stored_dtype: torch.dtype,
    workspace: Workspace,
) -> None:
    """Reads a plainly stored tensor into `memory`, the memory of `tensor`, and casts if needed."""
    casts = tensor.dtype != stored_dtype
    # The checksum is of the stored bytes, so they are read whole before a cast.
    data = empty_bytes(source.record.source_bytes) if casts else memory
    try:
        source.file.read_into(source.offset, memoryview(data))
    except TruncatedError as exc:
        raise exc.located(tensor=source.record.name) from None
    where = source.file.name, source.record.name, source.offset
    check_xxh3(data, source.record.xxh3, *where)
    if casts:
        tensor.copy_(tensor_over(data, tuple(tensor.shape), stored_dtype))
