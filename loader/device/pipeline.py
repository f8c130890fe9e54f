"""The thread that loads tensors onto a device, and everything that it keeps going at the same time.

While one batch is decoded on the device, the next is being copied there, and threads read and check the ones behind it. The
host waits for the device in two places only, both by events: before it overwrites a pinned buffer whose copy may still run, and
before it hands a tensor out, when the fault words of its last batch have come back.

Besides the tensors themselves the device holds, for the time of the load, STAGES buffers of stored bytes, one arena of symbols
and, for zstd, nvCOMP's scratch of three bytes a symbol: at most 3 * 64 + 128 MiB, and 384 MiB more for zstd; a container with a
larger band of tiles than SLOT_BYTES and ARENA_BYTES needs as much more. The host holds RING pinned buffers: 256 MiB.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from codecllm.formats.checksums import xxh3_stream
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.loader.device.buffers import DeviceBuffer, PinnedBuffer, empty_on_device
from codecllm.loader.device.chunks import ChunkList, ChunkWork, DeviceTools, Verdict, plane_places
from codecllm.loader.device.codecs import DeviceCodecs
from codecllm.loader.device.finish import finish_bands, side_arrays
from codecllm.loader.device.plan import (
    ARENA_BYTES,
    SLOT_BYTES,
    Batch,
    Piece,
    Request,
    aligned,
    band_rows,
    cut,
)
from codecllm.loader.device.read import decodes_on_host, read_piece
from codecllm.loader.device.streams import Event, Streams
from codecllm.loader.host.pool import DecodePool, known, started
from codecllm.loader.host.promise import Promise

_LOG = logging.getLogger(__name__)

RING = 4
"""Pinned buffers: one being copied, three being filled."""

READERS = 3
"""Threads that read and check stored chunks, whatever the number of cores. Reading and hashing go on outside the interpreter's
lock, at several GB/s a thread; but each chunk takes the lock once, as does every call by which the pipeline queues work for the
device, and with more threads the pipeline waits longer for the lock than it gains."""

STAGES = 3
"""Buffers of stored bytes on the device: one being decoded, one ready, one being copied to."""

_EXIT_SECONDS = 10.0
"""How long an interpreter that ends waits for a load that nobody closed: longer, and the device is broken."""


@dataclass(slots=True, eq=False)
class _Reading:
    """A batch whose pieces are being read."""

    batch: Batch
    slot: PinnedBuffer
    stage: DeviceBuffer
    memory: torch.Tensor
    jobs: list[Future[None]]


@dataclass(slots=True, eq=False)
class _Issued:
    """A batch whose work is queued on the device.

    Attributes:
        finished: tensors that are whole once it is done.
        done: behind its last work, the copy of its status words included.
        verdict: how the decoding of its chunks went, on the device.
        status: the same on the host, once it is done.
    """

    finished: list[Request]
    done: Event
    verdict: Verdict | None
    status: torch.Tensor | None


class DevicePipeline:
    """Loads tensors of one container onto one device; requests may come from any thread."""

    def __init__(
        self, container: Container, pool: DecodePool, streams: Streams, codecs: DeviceCodecs
    ) -> None:
        """Starts the thread; memory is allocated when the first tensor is asked for."""
        self._container, self._pool, self._streams, self._codecs = container, pool, streams, codecs
        self._readers = DecodePool(min(READERS, pool.workers))
        self._tools = DeviceTools(streams, codecs)
        self._wanted: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._upcoming: deque[Piece] = deque()
        self._pieces: Iterator[Piece] | None = None
        self._open: dict[Request, Any] = {}
        self._reading: deque[_Reading] = deque()
        self._issued: deque[_Issued] = deque()
        self._slots = [PinnedBuffer() for _ in range(RING)]
        self._stages = [DeviceBuffer() for _ in range(STAGES)]
        self._arena: torch.Tensor | None = None
        self._count = 0
        self._size = aligned(container.manifest.decoded_bytes)
        self._least = min(SLOT_BYTES, self._size)
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._may_decode = False
        self._changed: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waited = {"files": 0.0, "copies": 0.0, "device": 0.0}
        _running.add(self)
        try:
            self._thread = started(self._run, "codecllm-device")
        except (
            BaseException
        ):  # Ctrl-C, when the thread may have begun already: nobody else will end it
            self._end_soon()
            raise

    def request(self, request: Request) -> Promise[torch.Tensor]:
        """Queues a tensor; its promise gets it, complete and checked, or the first error of the pipeline."""
        with self._lock:
            error = self._error
            if error is None:
                self._wanted.put(request)
        if error is not None:
            request.done.fail(error)
        return request.done

    def start_decoding(self) -> None:
        """Lets memory be taken on the device; before, requests are only read."""
        self._may_decode = True
        self._changed.put(
            None
        )  # again and again, and for no one but once: a check before could be where Ctrl-C comes

    def close(self) -> None:
        """Drops what is still queued, waits for work under way and frees all memory but the tensors handed out."""
        self._end_soon()
        self._thread.join()

    def _end_soon(self) -> None:
        try:
            self._fail(RuntimeError("the load was closed"))
        finally:  # Ctrl-C may have come first: the thread ends all the same
            self._wanted.put(None)
            self._changed.put(None)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        self.start_decoding()  # or rather end waiting for it

    @torch.no_grad()
    def _run(self) -> None:
        try:
            with self._streams.here():
                for slot in (
                    self._slots
                ):  # pinning takes a tenth of a second, which the model's building may hide
                    slot.claim(self._least, self._least, self._streams)
                while self._error is None:
                    self._step()
        except BaseException as exc:
            self._fail(exc)
        finally:
            self._end()

    def _step(self) -> None:
        """Does whatever can be done next, most urgent first; waits only where there is nothing else to do."""
        while self._issued and self._issued[0].done.query():
            self._settle()
        idle = not self._reading and not self._issued
        while len(self._reading) < RING - 1:
            batch = self._next_batch(wait=idle)
            if batch is None:
                break
            self._start_reading(batch)
            idle = False
        if self._reading:
            self._issue(self._reading.popleft())
        elif self._issued:
            self._settle()

    def _next_batch(self, wait: bool) -> Batch | None:
        batch = Batch()
        while self._error is None:
            piece = self._next_piece(wait and not batch.pieces)
            if piece is None:
                break
            if not batch.takes(piece):
                self._upcoming.appendleft(piece)
                break
            batch.add(piece)
        return batch if batch.pieces else None

    def _next_piece(self, wait: bool) -> Piece | None:
        """Returns the next piece of the tensors asked for; None where there is none, or, after waiting, at the end."""
        return self._upcoming.popleft() if self._upcoming else self._plan_piece(wait)

    def _await_decoding(self) -> None:
        """Waits until memory may be taken on the device; opens what was asked for meanwhile."""
        while not self._may_decode:
            piece = self._plan_piece(wait=False)
            if piece is None:
                self._changed.get()
            else:
                self._upcoming.append(piece)

    def _plan_piece(self, wait: bool) -> Piece | None:
        while True:
            piece = next(self._pieces, None) if self._pieces is not None else None
            if piece is not None:
                return piece
            try:
                request = self._wanted.get(block=wait)
            except queue.Empty:
                return None
            if request is None:
                self._fail(RuntimeError("the load was closed"))
                return None
            self._open[request] = None
            self._pieces = cut(request, self._container, self._codecs)

    def _start_reading(self, batch: Batch) -> None:
        slot, stage = self._slots[self._count % RING], self._stages[self._count % STAGES]
        self._count += 1
        with self._waiting("copies"):
            memory = slot.claim(batch.slot_bytes, self._least, self._streams)
        jobs = []
        for piece, place, _ in batch.pieces:
            buffer = memory[place : place + piece.host_bytes]
            threads = self._pool if decodes_on_host(piece) else self._readers
            jobs.append(threads.submit(partial(read_piece, piece, buffer)))
        self._reading.append(_Reading(batch, slot, stage, memory, jobs))

    def _issue(self, reading: _Reading) -> None:
        """Waits until a batch is read, then queues its copy, its decoding and its finish."""
        with self._waiting("files"):
            for job in reading.jobs:
                job.result()
        self._await_decoding()
        if self._error is not None:
            return
        streams, batch = self._streams, reading.batch
        self._check_plain(reading)
        self._allocate(batch)
        stage = reading.stage
        staged = stage.claim(batch.slot_bytes, self._least, streams)
        work = self._describe(batch, staged, reading.memory)
        tables = self._tools.expand(work) if work is not None else None
        with streams.on(streams.copy):
            staged.copy_(reading.memory, non_blocking=True)
        reading.slot.copied = streams.record(streams.copy)
        streams.wait(streams.decode, reading.slot.copied)
        streams.follow(
            streams.decode
        )  # the memory of new tensors may have been another's on the caller's stream
        with streams.on(streams.decode):
            verdict = None
            if work is not None:
                if tables is not None:
                    streams.wait(streams.decode, tables[1])
                assert self._arena is not None
                words = staged[batch.host_bytes :].view(torch.int64)
                verdict = work.launch(
                    words, staged, self._arena, self._tools, tables[0] if tables else None
                )
            for piece, place, symbols in batch.pieces:
                self._finish(piece, staged[place : place + piece.host_bytes], symbols)
            status = None
            if verdict is not None:
                status = streams.pinned(verdict.status.nbytes).view(torch.int64)
                status.copy_(verdict.status, non_blocking=True)
        stage.decoded = streams.record(streams.decode)
        finished = [piece.request for piece, _, _ in batch.pieces if piece.ends]
        self._issued.append(_Issued(finished, stage.decoded, verdict, status))

    def _check_plain(self, reading: _Reading) -> None:
        """Compares the checksums of plainly stored tensors, each over all of its pieces."""
        for piece, place, _ in reading.batch.pieces:
            source = piece.source
            if not isinstance(source, PlainTensor):
                continue
            hasher = self._open[piece.request] = self._open[piece.request] or xxh3_stream()
            hasher.update(reading.memory[place : place + piece.host_bytes].numpy())
            got = hasher.hexdigest()
            if piece.ends and got != source.record.xxh3:
                where: dict[str, Any] = {
                    "file": source.file.name,
                    "tensor": source.record.name,
                    "byte": source.offset,
                }
                expected = source.record.xxh3
                raise ChecksumError(
                    "stored bytes differ from the manifest: xxh3",
                    got=got,
                    expected=expected,
                    **where,
                )

    def _allocate(self, batch: Batch) -> None:
        """Makes the tensors that begin in a batch, on the caller's stream: theirs is the pool that the model's memory is of."""
        for piece, _, _ in batch.pieces:
            if piece.request.out is None:
                piece.request.out = torch.empty(
                    piece.shape, dtype=piece.dtype, device=self._streams.device
                )
        if batch.arena_bytes and (self._arena is None or self._arena.numel() < batch.arena_bytes):
            self._arena = None
            self._arena = empty_on_device(
                max(batch.arena_bytes, min(ARENA_BYTES, self._size)), self._streams
            )

    def _describe(
        self, batch: Batch, staged: torch.Tensor, memory: torch.Tensor
    ) -> ChunkWork | None:
        """Describes the chunks that the device decodes, behind the pieces in pinned memory."""
        chunks = ChunkList()
        for piece, place, symbols in batch.pieces:
            if piece.staged is None:
                assert isinstance(piece.source, StoredTensor)
                chunks.add(piece.source, piece.bands, place, self._planes(piece, symbols))
        if not len(chunks):
            return None
        assert self._arena is not None
        work = ChunkWork(chunks, staged.data_ptr(), self._arena.data_ptr())
        target = memory[batch.host_bytes :].numpy().view(np.int64)
        target[: len(work.words)] = work.words
        target[len(work.words) :] = 0
        return work

    def _planes(self, piece: Piece, symbols: int) -> list[int]:
        assert isinstance(piece.source, StoredTensor)
        _, rows = band_rows(piece.source, piece.bands)
        return plane_places(piece.source, rows * piece.source.table.grid.cols, symbols)

    def _finish(self, piece: Piece, staged: torch.Tensor, symbols: int) -> None:
        """Queues what turns a piece's bytes or symbols into elements of its tensor."""
        out, source = piece.request.out, piece.source
        assert out is not None
        if not out.numel():
            return
        if isinstance(source, PlainTensor):
            assert piece.staged is not None
            out.view(-1)[piece.bands.start : piece.bands.stop].copy_(staged.view(piece.staged))
            return
        if piece.request.part == "payload":
            first = int(
                source.table.offsets[
                    piece.bands.start * source.table.grid.across * source.table.planes
                ]
            )
            out[first : first + staged.numel()].copy_(staged)
            return
        grid = source.table.grid
        row, rows = band_rows(source, piece.bands)
        target = out.view(grid.rows, grid.cols)[row : row + rows]
        if piece.staged is not None:
            target.copy_(staged.view(piece.staged).view(rows, grid.cols))
            return
        assert self._arena is not None
        planes = [
            self._arena[place : place + rows * grid.cols] for place in self._planes(piece, symbols)
        ]
        sides, end = [], staged.numel()
        for side in reversed(side_arrays(source, (row, rows))):
            end -= aligned(side.nbytes)
            sides.append(
                staged[end : end + side.nbytes].view(
                    torch.int32 if side.dtype.kind == "i" else torch.float32
                )
            )
        finish_bands(source, (row, rows), planes, sides[::-1], target)

    def _settle(self) -> None:
        """Waits for the oldest batch on the device, reads its faults and hands its tensors out.

        Raises:
            DecodeError: a chunk did not decode.
        """
        issued = self._issued.popleft()
        with self._waiting("device"):
            issued.done.synchronize()
        if issued.verdict is not None:
            assert issued.status is not None
            issued.verdict.work.raise_fault(issued.status.numpy(), self._tools)
        for request in issued.finished:
            self._open.pop(request, None)
            out, request.out = request.out, None
            assert out is not None
            request.done.give(out)

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._waited[what] += time.perf_counter() - started

    def _end(self) -> None:
        """Lets go of all memory once no work uses it, and gives every request that is still open the error."""
        assert self._error is not None
        try:
            for reading in self._reading:
                for job in reading.jobs:
                    job.cancel()
                    if not job.cancelled():
                        job.exception()
            self._readers.close()
            self._streams.synchronize()
        except Exception:  # of a device that is broken: those who wait get the first error
            _LOG.debug(
                "%s: could not wait for the work under way", self._streams.device, exc_info=True
            )
        waits = ", ".join(f"{seconds:.3f} s for {what}" for what, seconds in self._waited.items())
        _LOG.debug("%s: %d batches; waited %s", self._streams.device, self._count, waits)
        self._answer(self._error)
        self._reading.clear()
        self._issued.clear()
        self._slots, self._stages, self._arena, self._pieces = [], [], None, None

    def _answer(self, error: BaseException) -> None:
        """Gives every request that is still open, or queued, the error."""
        left = list(self._open)
        self._open.clear()
        while True:
            try:
                request = self._wanted.get_nowait()
            except queue.Empty:
                break
            if request is not None:
                left.append(request)
        for request in left:
            request.out = None
            if not request.done.given:
                request.done.fail(error)


_running: weakref.WeakSet[DevicePipeline] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Ends the threads of pipelines that nobody closed (Ctrl-C came first), before the interpreter's end kills them."""
    left = known(_running)
    for pipeline in left:
        pipeline._end_soon()
    for pipeline in left:
        if (thread := getattr(pipeline, "_thread", None)) is not None:
            thread.join(_EXIT_SECONDS)
