"""A batch of chunks: described on the host, decoded on the device, its faults read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.codecs import RANS_ID
from codecllm.formats.codecs.rans_table import parse_tables
from codecllm.formats.errors import DecodeError
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.device.codecs import RAW_ID, ZSTD_ID, DeviceTools
from codecllm.loader.device.nvcomp import ZstdFrames

if TYPE_CHECKING:
    from codecllm.loader.kernels.rans import DeviceTables, RansChunks

WORDS_PER_CHUNK = 8
"""Most int64 that describe a chunk.

5 for `rans`, 4 for zstd, 3 for a raw one, and 3 more where its symbols are codes.
"""

NO_FAULT = 0
"""Fault word of a `rans` chunk that is whole, and status of a frame that is."""

CODE_128 = 0x80
"""The symbol that is no code: -128 as a byte."""

_ARENA_ALIGNMENT = 16


@dataclass(slots=True)
class ChunkList:
    """Chunks to be decoded, one column per fact, growing tensor by tensor.

    Attributes:
        tensors: the tensor of each chunk, and its number there.
        columns: per tensor added int64 [5, n]: slot in the stored bytes, stored bytes, symbols,
            place in the arena, codec.
        table_of: per tensor added int64 [n]: number of the table in `tables`, 0 where the codec has
            none.
        codes: per tensor added bool [n]: whether a chunk's symbols are int8 codes, or the high
            parts of wide ones.
        tables: the tables, packed.
    """

    tensors: list[tuple[StoredTensor, int, int]] = field(default_factory=list)
    columns: list[NDArray[np.int64]] = field(default_factory=list)
    table_of: list[NDArray[np.int64]] = field(default_factory=list)
    codes: list[NDArray[np.bool_]] = field(default_factory=list)
    tables: list[bytes] = field(default_factory=list)
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, source: StoredTensor, bands: range, slot: int, planes: list[int]) -> None:
        """Adds all chunks of some bands of tiles.

        Args:
            source: their tensor.
            bands: numbers of the bands.
            slot: where the first chunk's slot lies in the stored bytes, a multiple of 16; the
                others follow as in the payload.
            planes: where each plane's symbols go in the arena, in the order of the tiles.
        """
        first, last = chunks_of(source, bands)
        table, count = source.table, source.table.planes
        raw = table.raw_bytes[first:last]
        in_plane = np.cumsum(raw[::count]) - raw[::count]
        # Planes of a tile follow each other in the payload, but each plane is whole in the arena.
        places = (in_plane[:, None] + np.array(planes, np.int64)[None, :]).reshape(-1)
        records = table.records[first:last]
        slots = slot + table.offsets[first:last] - table.offsets[first]
        self.columns.append(
            np.stack([slots, records["stored_bytes"], raw, places, records["codec"]]).astype(
                np.int64
            )
        )
        self.table_of.append(self._tables_of(source, first, records["codec"]))
        last_plane = np.arange(first + 1, last + 1) % count == 0
        # Only the last plane of codes has a forbidden symbol; low bits of wide codes have none.
        self.codes.append(last_plane & isinstance(source.record, Int8Tensor))
        self.tensors.append((source, first, last))

    def locate(self, index: int) -> dict[str, Any]:
        """Returns file, tensor, chunk and byte of a chunk of the list."""
        for source, first, last in self.tensors:
            if index < last - first:
                chunk = first + index
                byte = source.offset + int(source.table.offsets[chunk])
                return {
                    "file": source.file.name,
                    "tensor": source.record.name,
                    "chunk": chunk,
                    "byte": byte,
                }
            index -= last - first
        raise IndexError(index)

    def __len__(self) -> int:
        return sum(column.shape[1] for column in self.columns)

    def _tables_of(
        self, source: StoredTensor, first: int, codecs: NDArray[Any]
    ) -> NDArray[np.int64]:
        """Adds the tables of a tensor's `rans` chunks; returns the number of each chunk's table."""
        table_numbers = np.zeros(len(codecs), np.int64)
        rans_chunks = np.flatnonzero(codecs == RANS_ID)
        if len(rans_chunks):
            tables = source.tables
            assert tables is not None
            row, col = np.divmod((first + rans_chunks) // tables.planes, tables.groups.cols)
            group = (
                row // tables.groups.tile_rows * tables.groups.across
                + col // tables.groups.tile_cols
            )
            # Chunks of a group share a table: it is sent and expanded once for all of them.
            places, order = np.unique(
                group * tables.planes + (first + rans_chunks) % tables.planes, return_inverse=True
            )
            numbers = [self._number_of(source, place) for place in places.tolist()]
            table_numbers[rans_chunks] = np.array(numbers)[order]
        return table_numbers

    def _number_of(self, source: StoredTensor, place: int) -> int:
        """Returns the number of a table of a tensor's, added if it is not there."""
        key = (id(source), place)
        if key not in self._numbers:
            assert source.tables is not None
            begin, end = source.tables.offsets[place : place + 2].tolist()
            self._numbers[key] = len(self.tables)
            self.tables.append(source.tables.data[begin:end])
        return self._numbers[key]


class ChunkWork:
    """The described batch.

    Attributes:
        words: int64 [n] on the host: the description for the device; the caller copies it there and
            gives it to `launch`.
        tables: int64 [tables] precisions and int64 [tables, 256] frequencies, to be expanded for
            `launch`.
    """

    def __init__(self, chunks: ChunkList, stored_address: int, arena_address: int) -> None:
        """Sorts chunks by codec and describes each kind as its decoder wants it.

        Args:
            chunks: the chunks.
            stored_address: where the stored bytes will lie in device memory.
            arena_address: where the arena lies.

        Raises:
            DecodeError: a `rans` chunk has an impossible size, or its table is malformed.
        """
        self._chunks = chunks
        slots, stored_sizes, raw, places, codecs = np.concatenate(chunks.columns, axis=1)
        tables = np.concatenate(chunks.table_of)
        self._raw = raw
        rans, zstd, plain = (
            np.flatnonzero(codecs == codec) for codec in (RANS_ID, ZSTD_ID, RAW_ID)
        )
        # Faults come back in this order, by decoder; `raise_fault` needs the chunks'.
        self._order = np.concatenate([rans, zstd])
        self._rans = self._describe_rans(rans, slots, stored_sizes, raw, places, tables)
        self.tables = self._parse_tables(tables, codecs == RANS_ID)
        self._by_codec = (rans, zstd, plain)
        frames = [
            slots[zstd] + stored_address,
            stored_sizes[zstd],
            raw[zstd],
            places[zstd] + arena_address,
        ]
        code_chunks = np.flatnonzero(np.concatenate(chunks.codes))
        self._counts = (len(rans), len(zstd), len(plain), len(code_chunks))
        self._largest, self._total = int(raw[zstd].max(initial=0)), int(raw[zstd].sum())
        parts = [
            self._rans.fields.numpy().reshape(-1),
            *frames,
            np.stack([slots[plain], places[plain], raw[plain]], axis=1).reshape(-1),
            np.stack([places[code_chunks], raw[code_chunks], code_chunks], axis=1).reshape(-1),
        ]
        self._starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        self.words: NDArray[np.int64] = np.concatenate(parts)

    @property
    def temp_bytes_for(self) -> tuple[int, int, int] | None:
        """Arguments of `Nvcomp.temp_bytes`, or None where no chunk is zstd's."""
        return (self._counts[1], self._largest, self._total) if self._counts[1] else None

    @property
    def can_be_recorded(self) -> bool:
        """Whether all of it are kernels of ours; nvCOMP may ask the device while it launches."""
        return not self._counts[1]

    def launch(
        self,
        words: torch.Tensor,
        stored: torch.Tensor,
        arena: torch.Tensor,
        tools: DeviceTools,
        tables: DeviceTables | None,
        checks: bool = True,
        part: range | None = None,
    ) -> Verdict:
        """Queues the decoding of all chunks, or a part of them, on the current stream.

        That must be `tools.streams.decode` or a later one.

        Args:
            words: int64 [len(self.words)], on the device.
            stored: uint8 [n], on the device, at the address given before.
            arena: uint8 [m], on the device, likewise.
            tools: the decoders.
            tables: `tables`, expanded; None where there is none.
            checks: whether codes are searched for the forbidden one; the same bytes need it once.
            part: numbers of the chunks, in the order of the list; all without it. A part is not
                checked, and its verdict is not for `raise_fault`.

        Returns:
            The verdict, still on the device.
        """
        from codecllm.loader.kernels.place import find_forbidden, place_chunks
        from codecllm.loader.kernels.rans import RansChunks, decode_rans

        counts, code_chunks = self._counts[:3], self._counts[3]
        frames_at, raw_at, check_at = self._starts[1], self._starts[5], self._starts[6]
        rans, zstd, plain = (self._within(chunks, part) for chunks in self._by_codec)
        # First the decoded sizes of zstd's frames (int64), then a fault per decoded chunk and a
        # flag per chunk (int32).
        status = torch.zeros(
            len(zstd) + (len(rans) + len(zstd) + len(self._chunks) + 1) // 2,
            dtype=torch.int64,
            device=arena.device,
        )
        faults = status[len(zstd) :].view(torch.int32)
        if rans:
            assert tables is not None
            fields = words[: counts[0] * 5].view(-1, 5)[rans.start : rans.stop]
            rans_work = RansChunks(
                fields, self._rans.stored_bytes, self._rans.arena_bytes, self._rans.tables
            )
            decode_rans(stored, rans_work, tables, arena, faults[: len(rans)])
        if zstd:
            address = words.data_ptr() + 8 * (frames_at + zstd.start)
            step = 8 * counts[1]
            frames = ZstdFrames(
                address,
                address + step,
                address + 2 * step,
                address + 3 * step,
                len(zstd),
                self._largest,
                self._total,
            )
            tools.decode_zstd(frames, status, faults[len(rans) : len(rans) + len(zstd)])
        if plain:
            place_chunks(
                stored,
                words[raw_at : raw_at + 3 * counts[2]].view(-1, 3)[plain.start : plain.stop],
                int(self._raw.max()),
                arena,
            )
        if code_chunks and checks and part is None:
            fields = words[check_at : check_at + 3 * code_chunks].view(code_chunks, 3)
            flags = faults[len(rans) + len(zstd) :]
            find_forbidden(arena, fields, int(self._raw.max()), CODE_128, flags)
        return Verdict(self, status)

    @staticmethod
    def _within(chunks: NDArray[np.int64], part: range | None) -> range:
        """Returns where those of a part stand among ascending numbers of chunks."""
        if part is None:
            return range(len(chunks))
        return range(*np.searchsorted(chunks, (part.start, part.stop)).tolist())

    def raise_fault(self, status: NDArray[np.int64], tools: DeviceTools) -> None:
        """Raises the error of the first chunk whose status says so.

        Raises:
            DecodeError: with file, tensor and chunk.
        """
        rans, zstd = self._counts[:2]
        faults = status[zstd:].view(np.int32)
        chunk_faults, flags = (
            faults[: rans + zstd],
            faults[rans + zstd : rans + zstd + len(self._chunks)],
        )
        bad = np.zeros(len(self._chunks), np.bool_)
        wrong = chunk_faults != NO_FAULT
        # A frame may decode without a fault, and yet to another size than the record's.
        wrong[rans:] |= status[:zstd] != self._raw[self._order[rans:]]
        bad[self._order[wrong]] = True
        bad |= flags != 0
        if not bad.any():
            return
        index = int(bad.argmax())
        raise self._fault(index, chunk_faults, status, tools).located(**self._chunks.locate(index))

    def _fault(
        self, index: int, decoded: NDArray[np.int32], status: NDArray[np.int64], tools: DeviceTools
    ) -> DecodeError:
        from codecllm.loader.kernels.rans import fault_error

        rans = self._counts[0]
        (position,) = np.flatnonzero(self._order == index)[:1].tolist() or [-1]
        if 0 <= position < rans and decoded[position] != NO_FAULT:
            return fault_error(int(decoded[position]))
        if position >= rans:
            if decoded[position] != NO_FAULT:
                return DecodeError(tools.explain_zstd(int(decoded[position])))
            got = int(status[position - rans])
            if got != int(self._raw[index]):
                return DecodeError(
                    "frame decodes to a wrong size", got=got, expected=int(self._raw[index])
                )
        return DecodeError("code -128 is not allowed", got=-128, expected="-127 to 127")

    def _parse_tables(
        self, table_of: NDArray[np.int64], coded: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        try:
            return parse_tables(self._chunks.tables)
        except DecodeError as exc:
            first = int(np.flatnonzero(coded & (table_of == exc.chunk))[0])
            exc.chunk = None
            raise exc.located(**self._chunks.locate(first)) from None

    def _describe_rans(self, rans: NDArray[np.int64], *columns: NDArray[np.int64]) -> RansChunks:
        from codecllm.loader.kernels.rans import describe_chunks

        try:
            return describe_chunks(*(column[rans] for column in columns))
        except DecodeError as exc:
            place = self._chunks.locate(int(rans[exc.chunk or 0]))
            exc.chunk = None
            raise exc.located(**place) from None


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """The outcome of a launch, still on the device.

    Attributes:
        work: the launched batch.
        status: int64 [n] on the device.
    """

    work: ChunkWork
    status: torch.Tensor


def chunks_of(source: StoredTensor, bands: range) -> tuple[int, int]:
    """Returns the chunks [first, last) of bands of tiles."""
    step = source.table.grid.across * source.table.planes
    return bands.start * step, bands.stop * step


def plane_places(source: StoredTensor, symbols: int, start: int) -> list[int]:
    """Returns where planes of `symbols` bytes each lie in the arena from `start`, aligned."""
    step = plane_bytes(symbols)
    return [start + plane * step for plane in range(source.table.planes)]


def plane_bytes(symbols: int) -> int:
    """Returns the bytes that a plane takes in the arena."""
    return -(-symbols // _ARENA_ALIGNMENT) * _ARENA_ALIGNMENT
