"""Writes tensors into a shard in order, from blocks that worker threads encode ahead."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from codecllm.converter.encode.blocks import (
    ONE_PASS_COLUMNS,
    Block,
    group_extent,
    needs_scale_pass,
    runs_of,
)
from codecllm.converter.encode.buffers import Buffers
from codecllm.converter.encode.encoding import count_block, encode_block, scan_block
from codecllm.converter.encode.packing import EncodedBlock, PackedChunks
from codecllm.converter.encode.quantize import has_tiny_scale
from codecllm.converter.options import NonFinite
from codecllm.converter.plan.policy import plan_lossless
from codecllm.converter.plan.tensor_plan import ParamsProvider, TensorPlan, check_params
from codecllm.converter.write.backlog import Backlog
from codecllm.converter.write.digests import OrderedDigest
from codecllm.converter.write.records import EncodedTensor, coded_record, raw_record
from codecllm.formats.checksums import xxh3_hex, xxh3_stream
from codecllm.formats.codecs.entropy import entropies_by_counts
from codecllm.formats.codecs.rans_groups import pack_group_tables, tile_groups
from codecllm.formats.errors import NonFiniteWeightError
from codecllm.formats.limits import SLOT_ALIGNMENT
from codecllm.formats.manifest.records import SideChecksums, StoredRecord
from codecllm.formats.schemes.int8 import channel_scales
from codecllm.formats.shards.chunk_table import pack_chunk_table
from codecllm.formats.shards.shard_writer import ShardWriter
from codecllm.formats.shards.side_tensors import CHUNKS, SHAPE, SIDE_TENSORS, TABLES

Item = TypeVar("Item")
Result = TypeVar("Result")
_Lent = tuple[Any, NDArray[np.uint8] | None]  # bytes, and the buffer to give back behind them

_RAW_STEP = 4 << 20
_BLOCKS_COUNTED = 64  # blocks whose counts are kept: a few MiB
_ENTRY_BYTES = 384  # about the header's room for side tensors: less gain than that is none
_REASONS = {
    "tiny_scale": "int8: a channel is so small that its scale would be subnormal",
    "non_finite": "int8: weights are NaN or infinite",
    "overflow": "int8: rounded, weights near the largest of their dtype would be infinite",
    "codes": "int8: weights lie too many steps from zero, or steps are too large for codes beyond "
    "8 bits",
}


class _CannotQuantizeError(Exception):
    """The tensor under way cannot be int8, or not in one plane; `args[0]` is the problem."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A coded tensor in flight: its blocks, and scales (or a problem) known before the first."""

    plan: TensorPlan
    blocks: list[Block]
    scales: NDArray[np.float32] | None = None
    problem: str | None = None


def ordered(
    executor: Executor, work: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Iterator[Result]:
    """Runs `work` in threads and yields results in order, at most `window` ahead."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(executor.submit(work, item))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class TensorWriter:
    """Encodes planned tensors on an executor and appends them to shards.

    Blocks of the next tensors, also of the next shards, are encoded while earlier ones are hashed
    and written, each in other threads. Memory: `window` encoded blocks, and the `backlog` of what
    is being hashed or written.
    """

    def __init__(
        self,
        executor: Executor,
        plans: Iterable[TensorPlan],
        *,
        hashers: Executor,
        window: int,
        backlog: Backlog,
        buffers: Buffers,
        non_finite: NonFinite,
        on_bytes: Callable[[str, int], None],
        params: ParamsProvider | None = None,
    ) -> None:
        """Prepares writing; nothing is read yet.

        Args:
            executor: encodes blocks.
            plans: all tensors of all shards, in order.
            hashers: computes digests.
            window: blocks being encoded, or encoded and not yet taken.
            backlog: bounds the bytes that are being hashed or written.
            buffers: have the memory for blocks.
            non_finite: the treatment of int8 tensors with NaN or infinite weights.
            on_bytes: called with a tensor's name and the source bytes just done.
            params: chooses the parameters of int8 tensors; called once for each, in the order in
                which they are written.
        """
        self._executor = executor
        self._hashers = hashers
        self._window = window
        self._non_finite = non_finite
        self._on_bytes = on_bytes
        self._params = params
        self._jobs: dict[str, _Job] = {}
        self._backlog = backlog
        # Generators: a tensor is scanned when its turn is near, not at the start.
        coded_jobs = (self._job(plan) for plan in plans if plan.scheme != "raw")
        work = ((job, block) for job in coded_jobs if job.problem is None for block in job.blocks)
        self._buffers = buffers
        self._results = ordered(executor, self._encode, work, window)

    def write_all(
        self, plans: list[TensorPlan], shard: ShardWriter, number: int
    ) -> Iterator[Future[StoredRecord]]:
        """Writes the tensors of shard `number` in order and yields their records, once hashed.

        The shards' tensors must be written in the order in which they were announced.

        Raises:
            NonFiniteWeightError: an int8 tensor holds NaN or infinities, and `non_finite` is
                `error`.
            OSError, FormatError: reading or writing failed.
        """
        for plan in plans:
            if plan.scheme == "raw":
                yield self._write_raw(plan, shard, number)
                continue
            job = self._job(plan)
            yield self._write_job(job, self._results, shard, number, shard.mark())
            del self._jobs[plan.source.name]

    def _write_job(
        self,
        job: _Job,
        results: Iterator[EncodedBlock],
        shard: ShardWriter,
        number: int,
        mark: tuple[int, int],
    ) -> Future[StoredRecord]:
        own_blocks = islice(results, len(job.blocks)) if job.problem is None else iter(())
        try:
            if job.problem is not None:
                raise _CannotQuantizeError(job.problem)
            record = self._write_coded(job, own_blocks, shard, number)
        except _CannotQuantizeError as exc:
            deque(own_blocks, maxlen=0)  # the blocks of this tensor that were encoded ahead
            shard.rollback(mark)
            return self._write_instead(job.plan, exc.args[0], shard, number)
        # Coding did not pay: stored raw it is smaller, and nothing has to be decoded.
        if shard.data_bytes - mark[1] + _ENTRY_BYTES >= job.plan.source.entry.bytes:
            shard.rollback(mark)
            raw = TensorPlan(
                job.plan.source, "raw", fallback=f"{job.plan.scheme} does not shrink it"
            )
            return self._write_raw(raw, shard, number)
        return record

    def _write_instead(
        self, plan: TensorPlan, problem: str, shard: ShardWriter, number: int
    ) -> Future[StoredRecord]:
        """Writes a tensor that does not fit int8: losslessly, or with wide codes in two planes."""
        if problem == "non_finite" and self._non_finite == "error":
            raise self._non_finite_error(plan)
        if problem == "wide":
            other_plan = replace(plan, wide=True)
        else:
            other_plan = plan_lossless(
                plan.source, _REASONS[problem], plan.codec, plan.tile_symbols
            )
        if other_plan.scheme == "raw":
            return self._write_raw(other_plan, shard, number)
        job = _Job(other_plan, list(runs_of(other_plan)))
        encoded_blocks = ordered(
            self._executor, self._encode, ((job, block) for block in job.blocks), self._window
        )
        return self._write_job(job, encoded_blocks, shard, number, shard.mark())

    def _encode(self, item: tuple[_Job, Block]) -> EncodedBlock:
        job, block = item
        return encode_block(job.plan, block, job.scales, self._buffers)

    def _job(self, plan: TensorPlan) -> _Job:
        """Returns the tensor's job; the first call scans for scales that blocks need beforehand."""
        name = plan.source.name
        if name not in self._jobs:
            plan = self._with_params(plan)
            self._jobs[name] = (
                self._scan(plan) if needs_scale_pass(plan) else _Job(plan, list(runs_of(plan)))
            )
        return self._jobs[name]

    def _with_params(self, plan: TensorPlan) -> TensorPlan:
        """Asks for the parameters of an int8 tensor, unless its rows are too long for one block."""
        if self._params is None or not plan.accepts_params or plan.matrix[1] > ONE_PASS_COLUMNS:
            return plan
        params = self._params(plan)
        if params is None:
            return plan
        check_params(params, plan)
        return replace(plan, params=params, wide=params.wide)

    def _scan(self, plan: TensorPlan) -> _Job:
        blocks = list(runs_of(plan))
        absmax = np.zeros(plan.channels, np.float32)
        for block, block_scales in zip(
            blocks,
            ordered(self._executor, lambda b: scan_block(plan, b), blocks, self._window),
            strict=True,
        ):
            if not block_scales.finite:
                return _Job(plan, blocks, problem="non_finite")
            start = block.col if plan.kind == "column" else block.row
            part = absmax[start : start + len(block_scales.absmax)]
            np.maximum(part, block_scales.absmax, out=part)
        if has_tiny_scale(absmax):
            return _Job(plan, blocks, problem="tiny_scale")
        return _Job(plan, blocks, scales=channel_scales(absmax))

    def _write_coded(
        self, job: _Job, encoded: Iterator[EncodedBlock], shard: ShardWriter, number: int
    ) -> Future[StoredRecord]:
        plan = job.plan
        totals = _Gathered(plan)
        digest = OrderedDigest(self._hashers, hashlib.sha256())
        for block, part in zip(job.blocks, encoded, strict=True):
            if part.problem is not None:
                raise _CannotQuantizeError(part.problem)
            assert part.chunks is not None  # there is no problem
            totals.add(part, part.chunks)
            stored = part.chunks.slots, part.chunks.memory
            self._hash_and_write((part.digested, part.memory), stored, digest, shard)
            self._on_bytes(plan.source.name, block.rows * block.cols * plan.source.dtype.itemsize)
        tensor = totals.finish(job.scales)
        for scales in tensor.digested_scales():
            digest.update(scales)
        return digest.finish(_finish_coded(tensor, totals.tables, shard, number))

    def _hash_and_write(
        self, digested: _Lent, stored: _Lent, digest: OrderedDigest, shard: ShardWriter
    ) -> None:
        """Hands a block to the threads that hash and write; waits while the backlog is full."""
        sizes = memoryview(stored[0]).nbytes, memoryview(digested[0]).nbytes
        self._backlog.add(sum(sizes))
        shard.write(stored[0], done=partial(self._done, sizes[0], stored[1]))
        digest.update(digested[0], done=partial(self._done, sizes[1], digested[1]))

    def _done(self, size: int, memory: NDArray[np.uint8] | None) -> None:
        if memory is not None:
            self._buffers.give(memory)
        self._backlog.done(size)

    def _write_raw(self, plan: TensorPlan, shard: ShardWriter, number: int) -> Future[StoredRecord]:
        source = plan.source
        digest = OrderedDigest(self._hashers, hashlib.sha256(), xxh3_stream())
        for start in range(0, source.entry.bytes, _RAW_STEP):
            data = source.read_bytes(start, min(start + _RAW_STEP, source.entry.bytes))
            self._hash_and_write((data, None), (data, None), digest, shard)
            self._on_bytes(source.name, len(data))
        shard.end_tensor(source.name, source.dtype.name, source.shape)
        return digest.finish(partial(raw_record, plan, number))

    def _non_finite_error(self, plan: TensorPlan) -> NonFiniteWeightError:
        blocks = list(runs_of(plan))
        counts = np.zeros(plan.grid.rows, np.int64)
        for block, row_counts in zip(
            blocks,
            ordered(self._executor, lambda b: count_block(plan, b), blocks, self._window),
            strict=True,
        ):
            counts[block.row : block.row + block.rows] += row_counts
        rows = np.flatnonzero(counts)
        return NonFiniteWeightError(
            f"{counts.sum()} weights are NaN or infinite, in {len(rows)} rows, first in row "
            f"{rows[0]}; "
            "int8 cannot represent them (--non-finite lossless keeps such tensors as they are)",
            file=plan.source.file.name,
            tensor=plan.source.name,
        )


class _Gathered:
    """Sums and lists over the encoded blocks of one tensor, in order.

    Attributes:
        tables: packed `rans` tables, in order.
    """

    def __init__(self, plan: TensorPlan) -> None:
        self.tables: list[bytes] = []
        self._plan = plan
        self._chunks: list[NDArray[Any]] = []
        self._counts: list[tuple[NDArray[Any], NDArray[np.int64]]] = []
        self._entropy_bits = np.zeros(max(2, plan.source.dtype.planes))
        self._absmax: list[NDArray[np.float32]] = []
        self._worst_error = self._worst_steps = 0.0

    def add(self, block: EncodedBlock, chunks: PackedChunks) -> None:
        """Adds the next block, whose chunks are these."""
        self.tables += chunks.tables
        self._chunks.append(chunks.records)
        self._counts.append((chunks.counts, chunks.raw_bytes))
        if len(self._counts) == _BLOCKS_COUNTED:
            self._add_entropies()
        self._worst_error = max(self._worst_error, block.worst_error)
        self._worst_steps = max(self._worst_steps, block.worst_steps)
        # Only a tensor of one block turns wide here; a longer one begins anew.
        if block.wide:
            self._plan = replace(self._plan, wide=True)
        if block.absmax is not None:
            self._absmax.append(block.absmax)

    def _add_entropies(self) -> None:
        """Turns counts into entropies, those of many blocks at once."""
        if not self._counts:
            return
        planes = self._plan.planes
        counts, raw_bytes = map(np.concatenate, zip(*self._counts, strict=True))
        bits = entropies_by_counts(counts, raw_bytes).reshape(-1, planes).sum(axis=0)
        self._entropy_bits[:planes] += bits
        self._counts.clear()

    def finish(self, scales: NDArray[np.float32] | None) -> EncodedTensor:
        """Returns the whole tensor; `scales`, float32 [channels], are those of the scan or None."""
        self._add_entropies()
        params = self._plan.params
        if params is not None:
            scales = params.row_scale
        elif scales is None and self._absmax:
            scales = channel_scales(np.concatenate(self._absmax))
        return EncodedTensor(
            plan=self._plan,
            chunks=np.concatenate(self._chunks),
            entropy_bits=self._entropy_bits,
            scales=scales,
            worst_error=self._worst_error,
            worst_steps=self._worst_steps,
        )


def _finish_coded(
    tensor: EncodedTensor, tables: list[bytes], shard: ShardWriter, number: int
) -> Callable[[str], StoredRecord]:
    """Closes the payload and adds the side tensors; returns a maker of the record by its digest."""
    plan, source, grid = tensor.plan, tensor.plan.source, tensor.plan.grid
    planes = len(tensor.chunks) // len(grid)
    shard.end_tensor(source.name, "U8", (_payload_bytes(tensor.chunks),))
    side_values: dict[str, Any] = {
        **tensor.scale_sides(),
        SHAPE.key: np.array(source.shape, "<i8"),
        CHUNKS.key: pack_chunk_table(grid, planes, tensor.chunks),
    }
    tables_bytes = None
    if any(tables):
        groups = tile_groups(grid, *group_extent(plan))
        side_values[TABLES.key] = pack_group_tables(groups, planes, tables)
        tables_bytes = len(side_values[TABLES.key])
    for side in SIDE_TENSORS:
        if side.key in side_values:
            values = side_values[side.key]
            name = side.name_for(source.name)
            shard.add(name, side.dtype(plan.layout), (len(values),), values)
    checksums = SideChecksums(**{key: xxh3_hex(values) for key, values in side_values.items()})
    return partial(coded_record, tensor, number, checksums, tables_bytes)


def _payload_bytes(records: NDArray[Any]) -> int:
    return int(
        (-(-records["stored_bytes"].astype(np.int64) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT).sum()
    )
