"""resident="compressed" on a device.

Payloads stay in its memory as they are stored. Layers are decoded just before they run.

All payloads lie in one buffer, so that one batch decodes the weights of a whole layer. There are
two buffers for decoded weights: while one is multiplied, the other receives the next weights, on
the decode stream. Their order is learned from the first forward pass; anything else is decoded when
it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.device.chunks import (
    ChunkList,
    ChunkWork,
    DeviceTools,
    Verdict,
    plane_bytes,
    plane_places,
)
from codecllm.loader.device.codecs import DeviceCodecs
from codecllm.loader.device.finish import finish_bands, side_arrays, sides_of_rows, to_device
from codecllm.loader.device.plan import aligned, band_rows
from codecllm.loader.device.streams import Event, Streams
from codecllm.loader.engine import Engine, Request, fill
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.resident.compressed_form import (
    CodedMatrix,
    CompressedTensor,
    InMemoryFile,
    SharedDecoder,
    side_bytes,
)

GROUP_ELEMENTS = 1 << 27
"""Most elements decoded together: a thousand chunks. Two buffers of bfloat16 then take 512 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Bands of tiles of a tensor that are decoded, and used, together."""

    tensor: DeviceCompressedTensor
    bands: range

    @property
    def rows(self) -> int:
        """Rows of the block."""
        return band_rows(self.tensor.stored, self.bands)[1]

    @property
    def elements(self) -> int:
        """Elements of the block."""
        return self.rows * self.tensor.cols


@dataclass(slots=True, eq=False)
class _Group:
    """Blocks that are decoded as one batch, described for an arena at a certain address."""

    blocks: list[Block]
    arena: int = 0
    work: ChunkWork | None = None
    words: torch.Tensor | None = None
    tables: Any = None
    planes: list[list[int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Buffer:
    """Memory for decoded weights, and a note of its contents.

    Attributes:
        memory: the memory.
        group: the blocks that were decoded into it, or None.
        dtype: the dtype of that.
        ready: behind the decoding.
        used: by stream, behind the last use that was queued there.
    """

    memory: torch.Tensor | None = None
    group: _Group | None = None
    dtype: torch.dtype | None = None
    ready: Event | None = None
    used: dict[Any, Event] = field(default_factory=dict)


class DeviceCompressedTensor(CodedMatrix):
    """A matrix whose chunks lie in device memory as they are stored.

    Attributes:
        decoder: decodes it.
        slot: where its payload begins in the decoder's buffer.
        sides: `side_arrays` of the whole matrix, on the device.
        blocks: the matrix in blocks of at most GROUP_ELEMENTS.
    """

    def __init__(
        self, stored: StoredTensor, decoder: DeviceDecoder, slot: int, sides: list[torch.Tensor]
    ) -> None:
        """Describes a tensor whose payload `DeviceDecoder.load` will bring."""
        super().__init__(stored)
        self.decoder, self.slot, self.sides = decoder, slot, sides
        self.blocks: list[Block] = []

    def __reduce__(self) -> Any:
        """Travels as a matrix in the host's memory, which any process can decode."""
        file = InMemoryFile(self.stored.file.name, self.held_tensors()["payload"].cpu())
        stored = replace(self.stored, file=file, offset=0)
        return CompressedTensor, (stored, self.decoder.host_decoder)

    @property
    def lock(self) -> threading.RLock:
        """The decoder's."""
        return self.decoder.lock

    @property
    def nbytes(self) -> int:
        """Bytes of the payload and its side data, on the device and in the host's memory."""
        return sum(tensor.nbytes for tensor in self.held_tensors().values()) + side_bytes(
            self.stored
        )

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the payload and side data on the device."""
        sides = {f"side {number}": side for number, side in enumerate(self.sides)}
        return {"payload": self.decoder.payload(self), **sides}

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.dense`; decoded on the device of the payload."""
        out = torch.empty(self.rows, self.cols, dtype=dtype, device=self.decoder.device)
        with self.decoder.lock:
            for block in self.blocks:
                row, rows = band_rows(self.stored, block.bands)
                self.decoder.decode([block], [out[row : row + rows]])
        return out.to(device)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.gather`; decodes the tiles that hold the rows."""
        grid, here = self.stored.table.grid, self.decoder.device
        places = self.checked_rows(rows)
        out = torch.empty(len(places), self.cols, dtype=dtype, device=here)
        bands = torch.div(places, grid.tile_rows, rounding_mode="floor")
        needed = torch.unique(bands)
        step = max(1, GROUP_ELEMENTS // max(1, min(grid.tile_rows, grid.rows) * grid.cols))
        with self.decoder.lock:
            for first in range(0, len(needed), step):
                part = needed[first : first + step]
                blocks = [Block(self, range(band, band + 1)) for band in part.tolist()]
                heights = torch.tensor([block.rows for block in blocks])
                starts = torch.cumsum(heights, 0) - heights
                decoded = torch.empty(int(heights.sum()), self.cols, dtype=dtype, device=here)
                self.decoder.decode(blocks, list(decoded.split(heights.tolist())))
                targets = ((bands >= part[0]) & (bands <= part[-1])).nonzero().flatten()
                source = (
                    starts[torch.searchsorted(part, bands[targets])]
                    + places[targets]
                    - bands[targets] * grid.tile_rows
                )
                out.index_copy_(0, targets.to(here), decoded.index_select(0, source.to(here)))
        return out.to(device)

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields the matrix block by block, each in a buffer of the decoder. Hold `lock`."""
        for block in self.blocks:
            row, rows = band_rows(self.stored, block.bands)
            yield slice(row, row + rows), self.decoder.weight(block, dtype)
            self.decoder.used()


class DeviceDecoder:
    """The payloads of one model on one device, their scratch, and the tools that decode into it.

    Attributes:
        device: the device.
        lock: held from asking for a decoded weight until its use is queued.
        host_decoder: decodes copies of the model in other processes.
    """

    def __init__(self, streams: Streams, codecs: DeviceCodecs) -> None:
        """Allocates nothing yet."""
        self.device = streams.device
        self.lock = threading.RLock()
        self.host_decoder = _HostDecoder()
        self._streams = streams
        self._tools = DeviceTools(streams, codecs)
        self._payloads = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._filled = 0
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._buffers = (_Buffer(), _Buffer())
        self._current = 0
        self._order: list[Block] = []
        self._groups: list[_Group] = []
        self._group_of: dict[Block, int] = {}

    def hold(self, source: StoredTensor) -> DeviceCompressedTensor:
        """Returns a tensor; its payload is to be brought by `load`."""
        sides = to_device(side_arrays(source, (0, source.table.grid.rows)), self.device)
        tensor = DeviceCompressedTensor(source, self, self._filled, sides)
        self._filled += int(source.table.offsets[-1])
        grid = source.table.grid
        step = max(1, GROUP_ELEMENTS // max(1, min(grid.tile_rows, grid.rows) * grid.cols))
        for first in range(0, grid.down, step):
            tensor.blocks.append(Block(tensor, range(first, min(first + step, grid.down))))
        return tensor

    def load(self, tensors: Sequence[DeviceCompressedTensor], engine: Engine) -> None:
        """Brings the payloads of all tensors, and decodes everything once to see that it can be.

        Later decoding is of the same bytes; how it went is not read back.

        Raises:
            FormatError: a chunk is damaged or does not decode.
        """
        self._payloads = torch.empty(self._filled, dtype=torch.uint8, device=self.device)
        in_file_order = sorted(tensors, key=lambda t: (t.stored.file.name, t.stored.offset))
        requests = [
            Request(tensor.name, "payload", out=self.payload(tensor)) for tensor in in_file_order
        ]
        fill(engine, requests)
        with self.lock:
            groups = _grouped([block for tensor in tensors for block in tensor.blocks])
            for verdict in [self._launch(group) for group in groups]:
                with self._streams.on(self._streams.decode):
                    status = verdict.status.cpu().numpy()
                verdict.work.raise_fault(status, self._tools)

    def payload(self, tensor: DeviceCompressedTensor) -> torch.Tensor:
        """Returns the payload of a tensor, uint8 [bytes] on the device."""
        end = tensor.slot + int(tensor.stored.table.offsets[-1])
        return self._payloads[tensor.slot : end]

    def weight(self, block: Block, dtype: torch.dtype) -> torch.Tensor:
        """Returns a block decoded, [rows, columns], for work on the calling thread's stream."""
        self._refuse_capture()
        number = self._group_of.get(block)
        if number is None:
            self._learn(block)
            group = _Group([block])
        else:
            group = self._groups[number]
        buffer = self._buffers[self._current]
        if buffer.group is not group or buffer.dtype != dtype:
            self._current = 1 - self._current
            buffer = self._buffers[self._current]
            if buffer.group is not group or buffer.dtype != dtype:
                self._fill(buffer, group, dtype)
            assert buffer.ready is not None
            self._streams.wait(self._streams.current(), buffer.ready)
            if number is not None and len(self._groups) > 1:
                # All uses of the other buffer were queued before this call; the next work waits for
                # them.
                self._fill(
                    self._buffers[1 - self._current],
                    self._groups[(number + 1) % len(self._groups)],
                    dtype,
                )
        return self._places(buffer, group, dtype)[group.blocks.index(block)]

    def used(self) -> None:
        """Notes that the calling thread's stream has queued its use of the weight. Hold `lock`."""
        stream = self._streams.current()
        self._buffers[self._current].used[stream] = self._streams.record(stream)

    def decode(self, blocks: list[Block], outs: list[torch.Tensor]) -> None:
        """Decodes blocks into `outs`, [rows, columns]; the thread's stream waits. Hold `lock`."""
        self._refuse_capture()
        self._streams.follow(self._streams.decode)
        self._decode(_Group(blocks), outs)
        self._streams.wait(self._streams.current(), self._streams.record(self._streams.decode))

    def _refuse_capture(self) -> None:
        if self._streams.capturing():  # a recorded graph would not match this class's notes
            raise UnsupportedEnvironmentError(
                "resident='compressed' decodes ahead and cannot be recorded in a CUDA graph"
            )

    def _learn(self, block: Block) -> None:
        """Notes the order of the blocks; it is known when the first one comes again."""
        if self._order and block is self._order[0]:
            self._groups = _grouped(list(dict.fromkeys(self._order)))
            self._group_of = {
                member: number
                for number, group in enumerate(self._groups)
                for member in group.blocks
            }
            self._order = []
        elif not self._groups:
            self._order.append(block)

    def _fill(self, buffer: _Buffer, group: _Group, dtype: torch.dtype) -> None:
        """Queues the decoding of a group into a buffer, behind every use of its contents."""
        buffer.group = None  # until all is queued: a failure leaves nothing that looks decoded
        size = sum(aligned(block.elements * dtype.itemsize) for block in group.blocks)
        if buffer.memory is None or buffer.memory.numel() < size:
            self._streams.synchronize()  # no stream may have waited for weights decoded ahead
            for event in buffer.used.values():
                event.synchronize()
            buffer.memory = None
            with torch.inference_mode(False):  # a later caller may be outside of it
                buffer.memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        for event in buffer.used.values():
            self._streams.wait(self._streams.decode, event)
        buffer.used.clear()
        self._streams.follow(self._streams.decode)
        self._decode(group, self._places(buffer, group, dtype))
        buffer.ready = self._streams.record(self._streams.decode)
        buffer.dtype, buffer.group = dtype, group

    def _places(self, buffer: _Buffer, group: _Group, dtype: torch.dtype) -> list[torch.Tensor]:
        assert buffer.memory is not None
        places, start = [], 0
        for block in group.blocks:
            size = block.elements * dtype.itemsize
            places.append(
                buffer.memory[start : start + size].view(dtype).view(block.rows, block.tensor.cols)
            )
            start += aligned(size)
        return places

    def _decode(self, group: _Group, outs: list[torch.Tensor]) -> None:
        self._launch(group)
        with torch.inference_mode(), self._streams.on(self._streams.decode):
            for block, planes, out in zip(group.blocks, group.planes, outs, strict=True):
                source, symbols = block.tensor.stored, block.elements
                row, rows = band_rows(source, block.bands)
                sides = sides_of_rows(source, block.tensor.sides, (row, rows))
                arenas = [self._arena[place : place + symbols] for place in planes]
                finish_bands(source, (row, rows), arenas, sides, out)

    def _launch(self, group: _Group) -> Verdict:
        """Queues the decoding of a group's chunks into the arena, on the decode stream."""
        self._describe(group)
        assert group.work is not None and group.words is not None
        tables = group.tables[0] if group.tables is not None else None
        with torch.inference_mode(), self._streams.on(self._streams.decode):
            return group.work.launch(group.words, self._payloads, self._arena, self._tools, tables)

    def _describe(self, group: _Group) -> None:
        """Makes a group's description, once for an arena; it stays on the device."""
        if group.work is not None and group.arena == self._arena.data_ptr():
            return
        chunks, start, places = ChunkList(), 0, list[list[int]]()
        for block in group.blocks:
            source = block.tensor.stored
            first = block.bands.start * source.table.grid.across * source.table.planes
            planes = plane_places(source, block.elements, start)
            chunks.add(
                source, block.bands, block.tensor.slot + int(source.table.offsets[first]), planes
            )
            places.append(planes)
            start += source.table.planes * plane_bytes(block.elements)
        if self._arena.numel() < start:
            self._streams.synchronize()
            with torch.inference_mode(False):
                self._arena = torch.empty(start, dtype=torch.uint8, device=self.device)
        work = ChunkWork(chunks, self._payloads.data_ptr(), self._arena.data_ptr())
        with torch.inference_mode(False):
            words = torch.from_numpy(work.words).to(self.device)
            self._streams.keep(words, self._streams.decode)
            tables = self._tools.expand(work) if group.tables is None else group.tables
        self._streams.follow(self._streams.decode)
        if tables is not None:
            self._streams.wait(self._streams.decode, tables[1])
        group.words, group.tables, group.planes, group.work = words, tables, places, work
        group.arena = self._arena.data_ptr()  # last: it vouches for the rest


class _HostDecoder:
    """Becomes a decoder on the CPU where it is unpickled."""

    def __reduce__(self) -> Any:
        return _new_decoder, ()


def _new_decoder() -> SharedDecoder:
    return SharedDecoder(decoding_threads(None))


def _grouped(blocks: list[Block]) -> list[_Group]:
    """Gathers consecutive blocks into groups of at most GROUP_ELEMENTS, one block at least."""
    groups: list[_Group] = []
    size = 0
    for block in blocks:
        if not groups or size + block.elements > GROUP_ELEMENTS:
            groups.append(_Group([]))
            size = 0
        groups[-1].blocks.append(block)
        size += block.elements
    return groups
