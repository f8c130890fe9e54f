"""The second half of the way onto a device: copy, decoding and finish of a batch that was read.

One stream copies while a second decodes the batch before. Besides the tensors the device holds, for
the time of the load, STAGES buffers of stored bytes, one arena of symbols and, for zstd, nvCOMP's
scratch of three bytes a symbol: at most 3 * 64 + 128 MiB, and 384 MiB more for zstd. A container
with a band of tiles larger than SLOT_BYTES and ARENA_BYTES needs as much more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from codecllm.formats.checksums import xxh3_stream
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor
from codecllm.loader.device.buffers import DeviceBuffer, empty_on_device
from codecllm.loader.device.chunks import ChunkList, ChunkWork, Verdict, plane_places
from codecllm.loader.device.codecs import DeviceCodecs, DeviceTools
from codecllm.loader.device.finish import finish_bands, side_arrays
from codecllm.loader.device.plan import (
    ARENA_BYTES,
    SLOT_BYTES,
    Batch,
    Order,
    Piece,
    aligned,
    band_rows,
)
from codecllm.loader.device.reading import ReadingBatch
from codecllm.loader.device.streams import Event, Streams

STAGES = 3
"""Buffers of stored bytes on the device: one that is decoded, one ready, one that is copied to."""


@dataclass(slots=True, eq=False)
class IssuedBatch:
    """A batch whose work is queued on the device.

    Attributes:
        finished: orders whose tensors are whole once it is done.
        done: behind its last work, the copy of its status words included.
        verdict: how the decoding of its chunks went, on the device.
        status: the same on the host, once it is done.
    """

    finished: list[Order]
    done: Event
    verdict: Verdict | None
    status: torch.Tensor | None


class BatchIssuer:
    """Queues the work of batches on the device's streams; for one thread."""

    def __init__(self, container: Container, streams: Streams, codecs: DeviceCodecs) -> None:
        """Allocates nothing yet."""
        self._streams = streams
        self._tools = DeviceTools(streams, codecs)
        self._stages = [DeviceBuffer() for _ in range(STAGES)]
        self._arena: torch.Tensor | None = None
        self._batches = 0
        self._size = aligned(container.manifest.decoded_bytes)

    def issue(self, reading: ReadingBatch) -> IssuedBatch:
        """Queues copy, decoding and finish of a batch that is read.

        Raises:
            FormatError: a plainly stored tensor, or a table of codec `rans`, is damaged.
        """
        streams, batch = self._streams, reading.batch
        _check_plain(reading)
        self._allocate(batch)
        stage = self._stages[self._batches % STAGES]
        self._batches += 1
        stage_bytes = stage.claim(batch.slot_bytes, min(SLOT_BYTES, self._size), streams)
        work = self._describe(batch, stage_bytes, reading.memory)
        tables = self._tools.expand(work.tables) if work is not None else None
        with streams.on(streams.copy):
            stage_bytes.copy_(reading.memory, non_blocking=True)
        reading.slot.copied = streams.record(streams.copy)
        streams.wait(streams.decode, reading.slot.copied)
        # The memory of new tensors may have been another's on the caller's stream.
        streams.follow(streams.decode)
        with streams.on(streams.decode):
            verdict = None
            if work is not None:
                if tables is not None:
                    streams.wait(streams.decode, tables[1])
                assert self._arena is not None
                words = stage_bytes[batch.host_bytes :].view(torch.int64)
                device_tables = tables[0] if tables is not None else None
                verdict = work.launch(words, stage_bytes, self._arena, self._tools, device_tables)
            for piece, place, symbols in batch.pieces:
                self._finish(piece, stage_bytes[place : place + piece.host_bytes], symbols)
            status = self._copy_status(verdict)
        stage.decoded = streams.record(streams.decode)
        finished_orders = [piece.order for piece, _, _ in batch.pieces if piece.ends]
        return IssuedBatch(finished_orders, stage.decoded, verdict, status)

    def settle(self, issued: IssuedBatch) -> None:
        """Waits for a batch on the device and reads its faults.

        Raises:
            DecodeError: a chunk did not decode.
        """
        issued.done.synchronize()
        if issued.verdict is not None:
            assert issued.status is not None
            issued.verdict.work.raise_fault(issued.status.numpy(), self._tools)

    def free(self) -> None:
        """Lets go of the memory of the device."""
        self._stages.clear()
        self._arena = None

    def _allocate(self, batch: Batch) -> None:
        """Allocates the tensors that begin in a batch, and the arena.

        Tensors are allocated on the caller's stream: the model's memory is of its pool.
        """
        device = self._streams.device
        for piece, _, _ in batch.pieces:
            if piece.order.out is None:
                piece.order.out = torch.empty(piece.shape, dtype=piece.dtype, device=device)
        if batch.arena_bytes and (self._arena is None or self._arena.numel() < batch.arena_bytes):
            self._arena = None  # given back first
            size = max(batch.arena_bytes, min(ARENA_BYTES, self._size))
            self._arena = empty_on_device(size, self._streams)

    def _describe(
        self, batch: Batch, staged: torch.Tensor, memory: torch.Tensor
    ) -> ChunkWork | None:
        """Describes the chunks that the device decodes, behind the pieces in pinned memory."""
        chunks = ChunkList()
        for piece, place, symbols in batch.pieces:
            if piece.staged is None:
                assert isinstance(piece.source, StoredTensor)
                chunks.add(piece.source, piece.bands, place, _planes(piece, symbols))
        if not len(chunks):
            return None
        assert self._arena is not None
        work = ChunkWork(chunks, staged.data_ptr(), self._arena.data_ptr())
        target = memory[batch.host_bytes :].numpy().view(np.int64)
        target[: len(work.words)] = work.words
        # The rest is copied too: zeros, and not words of an older batch.
        target[len(work.words) :] = 0
        return work

    def _finish(self, piece: Piece, staged: torch.Tensor, symbols: int) -> None:
        """Queues the work that turns a piece's bytes or symbols into elements of its tensor."""
        out, source = piece.order.out, piece.source
        assert out is not None
        # A kernel cannot be launched over no elements.
        if not out.numel():
            return
        if isinstance(source, PlainTensor):
            assert piece.staged is not None
            out.view(-1)[piece.bands.start : piece.bands.stop].copy_(staged.view(piece.staged))
        elif piece.order.request.part == "payload":
            grid, planes = source.table.grid, source.table.planes
            first = int(source.table.offsets[piece.bands.start * grid.across * planes])
            out[first : first + staged.numel()].copy_(staged)
        else:
            self._finish_coded(piece, source, staged, symbols)

    def _finish_coded(
        self, piece: Piece, source: StoredTensor, staged: torch.Tensor, symbols: int
    ) -> None:
        grid, out = source.table.grid, piece.order.out
        assert out is not None
        row, rows = band_rows(source, piece.bands)
        target = out.view(grid.rows, grid.cols)[row : row + rows]
        if piece.staged is not None:
            target.copy_(staged.view(piece.staged).view(rows, grid.cols))
            return
        assert self._arena is not None
        size = rows * grid.cols
        planes = [self._arena[place : place + size] for place in _planes(piece, symbols)]
        sides, end = [], staged.numel()
        # From the end: the size of the chunks before them depends on the codec, theirs does not.
        for side in reversed(side_arrays(source, (row, rows))):
            end -= aligned(side.nbytes)
            dtype = torch.int32 if side.dtype.kind == "i" else torch.float32
            sides.append(staged[end : end + side.nbytes].view(dtype))
        finish_bands(source, (row, rows), planes, sides[::-1], target)

    def _copy_status(self, verdict: Verdict | None) -> torch.Tensor | None:
        if verdict is None:
            return None
        # Pinned and new: batches are in flight side by side, and a copy to other memory would wait.
        status = self._streams.pinned(verdict.status.nbytes).view(torch.int64)
        status.copy_(verdict.status, non_blocking=True)
        return status


def _check_plain(reading: ReadingBatch) -> None:
    """Compares the checksums of plainly stored tensors, each over all of its pieces.

    Raises:
        ChecksumError: a tensor's bytes are damaged.
    """
    for piece, place, _ in reading.batch.pieces:
        source, order = piece.source, piece.order
        if not isinstance(source, PlainTensor):
            continue
        order.hasher = order.hasher or xxh3_stream()
        order.hasher.update(reading.memory[place : place + piece.host_bytes].numpy())
        got = order.hasher.hexdigest()
        if piece.ends and got != source.record.xxh3:
            raise ChecksumError(
                "stored bytes differ from the manifest: xxh3",
                file=source.file.name,
                tensor=source.record.name,
                byte=source.offset,
                got=got,
                expected=source.record.xxh3,
            )


def _planes(piece: Piece, symbols: int) -> list[int]:
    assert isinstance(piece.source, StoredTensor)
    _, rows = band_rows(piece.source, piece.bands)
    return plane_places(piece.source, rows * piece.source.table.grid.cols, symbols)
