"""resident="compressed" on a device.

Payloads stay in its memory as they are stored. Layers are decoded just before they run.

All payloads lie in one buffer, so that one batch decodes the weights of a whole layer. There are
two buffers for decoded weights: while one is multiplied, the other receives the next weights, on
the decode stream. Their order is learned from the first forward pass; anything else is decoded when
it is asked for.

From its third time on, the decoding of a group into a buffer is the replay of a recording, where
the device has recordings: a dozen launches from Python would take longer than the device's work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.device import groups
from codecllm.loader.device.chunks import (
    ChunkList,
    ChunkWork,
    Verdict,
    plane_bytes,
    plane_places,
)
from codecllm.loader.device.codecs import DeviceCodecs, DeviceTools
from codecllm.loader.device.finish import finish_bands, side_arrays, sides_of_rows, to_device
from codecllm.loader.device.groups import Block, Buffer, Group, Recording, grouped
from codecllm.loader.device.plan import band_rows
from codecllm.loader.device.streams import Streams
from codecllm.loader.engine import Engine, Request, fill
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.resident.compressed_form import (
    CodedMatrix,
    CompressedTensor,
    InMemoryFile,
    SharedDecoder,
    side_bytes,
)


class DeviceCompressedTensor(CodedMatrix):
    """A matrix whose chunks lie in device memory as they are stored.

    Attributes:
        decoder: decodes it.
        slot: where its payload begins in the decoder's buffer.
        sides: `side_arrays` of the whole matrix, on the device.
        blocks: the matrix in blocks of at most groups.GROUP_ELEMENTS.
    """

    def __init__(
        self, stored: StoredTensor, decoder: DeviceDecoder, slot: int, sides: list[torch.Tensor]
    ) -> None:
        """Describes a tensor whose payload `DeviceDecoder.load` will bring."""
        super().__init__(stored)
        self.decoder, self.slot, self.sides = decoder, slot, sides
        self.blocks: list[Block] = []
        self._bands: Group | None = None

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
                self.decoder.decode(Group([block]), [out[row : row + rows]])
        return out.to(device)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.gather`; decodes the tiles that hold the rows."""
        grid, here = self.stored.table.grid, self.decoder.device
        places = self.checked_rows(rows)
        out = torch.empty(len(places), self.cols, dtype=dtype, device=here)
        bands = torch.div(places, grid.tile_rows, rounding_mode="floor")
        band_numbers = torch.unique(bands)
        if len(band_numbers) == 1:  # a token: nothing is computed or sent for it
            return self._rows_of_band(int(band_numbers), rows, dtype).to(device)
        step = max(1, groups.GROUP_ELEMENTS // max(1, min(grid.tile_rows, grid.rows) * grid.cols))
        with self.decoder.lock:
            for first in range(0, len(band_numbers), step):
                part = band_numbers[first : first + step]
                blocks = [Block(self, range(band, band + 1)) for band in part.tolist()]
                heights = torch.tensor([block.rows for block in blocks])
                starts = torch.cumsum(heights, 0) - heights
                decoded = torch.empty(int(heights.sum()), self.cols, dtype=dtype, device=here)
                self.decoder.decode(Group(blocks), list(decoded.split(heights.tolist())))
                targets = ((bands >= part[0]) & (bands <= part[-1])).nonzero().flatten()
                source = (
                    starts[torch.searchsorted(part, bands[targets])]
                    + places[targets]
                    - bands[targets] * grid.tile_rows
                )
                out.index_copy_(0, targets.to(here), decoded.index_select(0, source.to(here)))
        return out.to(device)

    def _rows_of_band(self, band: int, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._bands is None:  # described once for all tokens to come
            down = self.stored.table.grid.down
            self._bands = Group([Block(self, range(n, n + 1)) for n in range(down)], True)
        here, height = self.decoder.device, self._bands.blocks[band].rows
        decoded = torch.empty(height, self.cols, dtype=dtype, device=here)
        with self.decoder.lock:
            self.decoder.decode(self._bands, [decoded], band)
        first = band * self.stored.table.grid.tile_rows
        return decoded.index_select(0, rows.to(here) - first)

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields the matrix block by block, each in a buffer of the decoder. Hold `lock`."""
        for block in self.blocks:
            row, rows = band_rows(self.stored, block.bands)
            yield slice(row, row + rows), self.decoder.weight(block, dtype)


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
        self._buffers = (Buffer(), Buffer())
        self._current = 0
        self._order: list[Block] = []
        self._groups: list[Group] = []
        self._group_of: dict[Block, int] = {}

    def hold(self, source: StoredTensor) -> DeviceCompressedTensor:
        """Returns a tensor; its payload is to be brought by `load`."""
        sides = to_device(side_arrays(source, (0, source.table.grid.rows)), self.device)
        tensor = DeviceCompressedTensor(source, self, self._filled, sides)
        self._filled += int(source.table.offsets[-1])
        grid = source.table.grid
        step = max(1, groups.GROUP_ELEMENTS // max(1, min(grid.tile_rows, grid.rows) * grid.cols))
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
            blocks = [block for tensor in tensors for block in tensor.blocks]
            for verdict in [self._launch(group, checks=True) for group in grouped(blocks)]:
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
        buffer = self._buffers[self._current]
        if not buffer.holds(block, dtype):
            buffer = self._turn_to(block, dtype)
        number = self._streams.number()
        if number not in buffer.users:
            assert buffer.ready is not None
            stream = self._streams.current()
            self._streams.wait(stream, buffer.ready)
            buffer.users[number] = stream
        return buffer.weights[block]

    def _turn_to(self, block: Block, dtype: torch.dtype) -> Buffer:
        """Returns the other buffer with a block in it, and queues the decoding of what comes next.

        All uses of the buffer before were queued earlier; that decoding waits for them.
        """
        number = self._group_of.get(block)
        if number is None:
            self._learn(block)
        self._current = 1 - self._current
        buffer = self._buffers[self._current]
        if not buffer.holds(block, dtype):
            self._fill(buffer, Group([block]) if number is None else self._groups[number], dtype)
        if number is not None and len(self._groups) > 1:
            following = self._groups[(number + 1) % len(self._groups)]
            self._fill(self._buffers[1 - self._current], following, dtype)
        return buffer

    def decode(self, group: Group, outs: list[torch.Tensor], only: int | None = None) -> None:
        """Decodes blocks into `outs`, [rows, columns]; the thread's stream waits. Hold `lock`.

        `only` is the number of the block of a group whose blocks are decoded one by one.
        """
        self._refuse_capture()
        self._streams.follow(self._streams.decode)
        self._decode(group, outs, only)
        self._streams.wait(self._streams.current(), self._streams.record(self._streams.decode))

    def _refuse_capture(self) -> None:
        if self._streams.capturing():  # a recorded graph would not match this class's notes
            raise UnsupportedEnvironmentError(
                "resident='compressed' decodes ahead and cannot be recorded in a CUDA graph"
            )

    def _learn(self, block: Block) -> None:
        """Notes the order of the blocks; it is known when the first one comes again."""
        if self._order and block is self._order[0]:
            self._groups = grouped(list(dict.fromkeys(self._order)))
            self._group_of = {
                member: number
                for number, group in enumerate(self._groups)
                for member in group.blocks
            }
            self._order = []
        elif not self._groups:
            self._order.append(block)

    def _fill(self, buffer: Buffer, group: Group, dtype: torch.dtype) -> None:
        """Queues the decoding of a group into a buffer, behind every use of its contents."""
        buffer.weights = {}  # until all is queued: a failure leaves nothing that looks decoded
        self._describe(group)
        if buffer.memory is None or buffer.memory.numel() < group.size(dtype):
            self._enlarge(buffer, max(each.size(dtype) for each in (group, *self._groups)))
        here = self._streams.number()
        for number, stream in buffer.users.items():
            if number != here:
                self._streams.wait(self._streams.decode, self._streams.record(stream))
        self._streams.follow(self._streams.decode)
        buffer.users.clear()
        assert buffer.memory is not None
        weights = self._queue(group, buffer.memory, dtype)
        buffer.ready = self._streams.record(self._streams.decode)
        buffer.dtype, buffer.weights = dtype, weights

    def _enlarge(self, buffer: Buffer, size: int) -> None:
        self._streams.synchronize()  # no stream may have waited for weights decoded ahead
        for stream in buffer.users.values():
            self._streams.record(stream).synchronize()
        buffer.memory = None
        for group in self._groups:
            group.recordings.clear()  # they keep the memory before
        with torch.inference_mode(False):  # a later caller may be outside of it
            buffer.memory = torch.empty(size, dtype=torch.uint8, device=self.device)

    def _queue(
        self, group: Group, memory: torch.Tensor, dtype: torch.dtype
    ) -> dict[Block, torch.Tensor]:
        """Queues the decoding of a described group, as a replay if it was queued here before.

        Returns:
            The decoded blocks, [rows, columns] each, in `memory`.
        """
        place = (self._arena.data_ptr(), memory.data_ptr(), dtype)
        recording = group.recordings.get(place)
        if recording is not None and recording.replay is not None:
            recording.replay()
            return recording.weights
        weights = group.places(memory, dtype)
        work = partial(self._decode, group, list(weights.values()))
        if recording is not None and not recording.refused:
            assert group.work is not None
            if group.work.can_be_recorded:
                recording.replay = self._streams.recorded(self._streams.decode, work)
            recording.refused = recording.replay is None
        (work if recording is None or recording.replay is None else recording.replay)()
        if recording is None:
            group.recordings[place] = Recording(weights)
        return weights

    def _decode(self, group: Group, outs: list[torch.Tensor], only: int | None = None) -> None:
        self._launch(group, only=only)
        numbers = range(len(group.blocks)) if only is None else (only,)
        with torch.inference_mode(), self._streams.on(self._streams.decode):
            for number, out in zip(numbers, outs, strict=True):
                block = group.blocks[number]
                source, symbols = block.tensor.stored, block.elements
                row, rows = band_rows(source, block.bands)
                sides = sides_of_rows(source, block.tensor.sides, (row, rows))
                arenas = [self._arena[place : place + symbols] for place in group.planes[number]]
                finish_bands(source, (row, rows), arenas, sides, out)

    def _launch(self, group: Group, *, checks: bool = False, only: int | None = None) -> Verdict:
        """Queues the decoding of a group's chunks into the arena, on the decode stream.

        With `checks` the verdict says whether codes are allowed ones, too.
        """
        self._describe(group)
        assert group.work is not None and group.words is not None
        part = None if only is None else group.chunks[only]
        tables = group.tables[0] if group.tables is not None else None
        arguments = (group.words, self._payloads, self._arena, self._tools, tables, checks, part)
        with torch.inference_mode(), self._streams.on(self._streams.decode):
            return group.work.launch(*arguments)

    def _describe(self, group: Group) -> None:
        """Makes a group's description, once for an arena; it stays on the device."""
        if group.work is not None and group.arena == self._arena.data_ptr():
            return
        chunks, start, end = ChunkList(), 0, 0
        places, numbers = list[list[int]](), list[range]()
        for block in group.blocks:
            source = block.tensor.stored
            first = block.bands.start * source.table.grid.across * source.table.planes
            planes = plane_places(source, block.elements, start)
            chunks.add(
                source, block.bands, block.tensor.slot + int(source.table.offsets[first]), planes
            )
            places.append(planes)
            numbers.append(range(numbers[-1].stop if numbers else 0, len(chunks)))
            end = max(end, start + source.table.planes * plane_bytes(block.elements))
            start = 0 if group.one_by_one else end
        if self._arena.numel() < end:
            self._streams.synchronize()
            with torch.inference_mode(False):
                self._arena = torch.empty(end, dtype=torch.uint8, device=self.device)
        work = ChunkWork(chunks, self._payloads.data_ptr(), self._arena.data_ptr())
        with torch.inference_mode(False):
            words = torch.from_numpy(work.words).to(self.device)
            self._streams.keep(words, self._streams.decode)
            tables = self._tools.expand(work.tables) if group.tables is None else group.tables
        self._streams.follow(self._streams.decode)
        if tables is not None:
            self._streams.wait(self._streams.decode, tables[1])
        group.words, group.tables, group.work = words, tables, work
        group.planes, group.chunks = places, numbers
        group.recordings.clear()  # they read the words before
        group.arena = self._arena.data_ptr()  # last: it vouches for the rest


class _HostDecoder:
    """Becomes a decoder on the CPU where it is unpickled."""

    def __reduce__(self) -> Any:
        return _new_decoder, ()


def _new_decoder() -> SharedDecoder:
    return SharedDecoder(decoding_threads(None))
