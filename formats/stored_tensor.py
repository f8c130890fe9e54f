"""Tensors of an opened container: reading, checking and decoding their chunks (SPEC.md 5 to 7)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from codecllm.formats import limits
from codecllm.formats.checksums import check_xxh3, xxh3_each, xxh3_here
from codecllm.formats.codecs import CODECS, RANS_ID, ZSTD, rans
from codecllm.formats.codecs.rans_groups import GroupTables
from codecllm.formats.errors import (
    ChecksumError,
    DecodeError,
    FormatError,
    SchemaError,
    TruncatedError,
)
from codecllm.formats.files import Excerpt, SafeFile
from codecllm.formats.manifest.records import CodedTensor, Int8Tensor, RawTensor
from codecllm.formats.schemes.columns import Columns
from codecllm.formats.schemes.int8 import check_codes, step_sizes
from codecllm.formats.shards.chunk_table import ChunkTable
from codecllm.formats.tiling import Tile, channel_matrix, last_axis_matrix

_Symbols = TypeVar("_Symbols", np.uint8, np.int16)

Decoded = NDArray[np.uint8] | ChecksumError | SchemaError | DecodeError
"""The result for a chunk: its symbols, or why there are none."""


def sound(decoded: Decoded) -> NDArray[np.uint8]:
    """Returns the symbols of a chunk, or raises its error."""
    if isinstance(decoded, FormatError):
        raise decoded
    return decoded


class ReadsAt(Protocol):
    """The source of a tensor's bytes: an open file, or memory."""

    @property
    def name(self) -> str:
        """Its name, for errors."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills `target` from `offset`."""


@dataclass(frozen=True, slots=True)
class PlainTensor:
    """A tensor stored plainly: its record and where its bytes lie."""

    record: RawTensor
    file: SafeFile | Excerpt
    offset: int

    def read(self) -> bytearray:
        """Reads the tensor's bytes and checks them.

        Raises:
            ChecksumError: they differ from the manifest.
            TruncatedError: the shard ends early.
        """
        data = bytearray(self.record.source_bytes)
        try:
            self.file.read_into(self.offset, memoryview(data))
        except TruncatedError as exc:
            raise exc.located(tensor=self.record.name) from None
        check_xxh3(data, self.record.xxh3, self.file.name, self.record.name, self.offset)
        return data


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A coded tensor whose side data were read and checked; its payload was not touched yet.

    Attributes:
        record: its manifest record.
        file: the shard.
        offset: where the payload begins in the shard.
        table: its chunks.
        scales: float32 [channels] for `int8`, else None.
        tables: frequency tables, where chunks use codec `rans`, else None.
        columns: scales and order of the columns of an `int8` tensor that has them, else None.
    """

    record: CodedTensor
    file: ReadsAt
    offset: int
    table: ChunkTable
    scales: NDArray[np.float32] | None
    tables: GroupTables | None = None
    columns: Columns | None = None

    @property
    def wide(self) -> bool:
        """Whether it is an `int8` tensor whose codes have 16 bits, in two planes."""
        return self.scales is not None and self.table.planes == 2

    @property
    def tiles_together(self) -> int:
        """Tiles that give whole rows in the source's order only together.

        A row of tiles, or 1 where each tile does so.
        """
        return (
            1 if self.table.grid.in_source_order and not self.permuted else self.table.grid.across
        )

    @property
    def permuted(self) -> bool:
        """Whether columns are stored in another order than the source's."""
        return self.columns is not None and self.columns.order is not None

    def part(self, tile: int) -> Tile:
        """Returns the rectangle of the source's matrix of `tiles_together` tiles from `tile` on."""
        rectangle = self.table.grid.tile(tile)
        return (
            rectangle
            if self.tiles_together == 1
            else Tile(rectangle.row, 0, rectangle.rows, self.table.grid.cols)
        )

    def in_order(
        self, part: NDArray[_Symbols], out: NDArray[_Symbols] | None = None
    ) -> NDArray[_Symbols]:
        """Returns symbols or codes [rows, cols] of whole rows in the source's order.

        Args:
            part: the symbols; they come back as they are where columns are stored in the source's
                order.
            out: receives them otherwise, of the same shape; None allocates.
        """
        if self.columns is None or self.columns.places is None:
            return part
        # clip: under its default mode numpy copies `out` to check the indices first.
        return part.take(self.columns.places, axis=1, out=out, mode="clip")

    def slots_bytes(self, first: int, last: int) -> int:
        """Size of the slots of chunks [first, last)."""
        return int(self.table.offsets[last] - self.table.offsets[first])

    def read_slots(self, first: int, last: int, buffer: bytearray) -> memoryview:
        """Reads the slots of chunks [first, last) with one read; they are not checked.

        Args:
            first: number of the first chunk.
            last: number behind the last chunk.
            buffer: its head receives the slots; it must be large enough.
        """
        view = memoryview(buffer)[: self.slots_bytes(first, last)]
        try:
            self.file.read_into(self.offset + int(self.table.offsets[first]), view)
        except TruncatedError as exc:
            raise exc.located(tensor=self.record.name, chunk=first) from None
        return view

    def stored_chunk(self, chunk: int, slots: memoryview, first: int) -> memoryview:
        """Returns the verified stored bytes of a chunk.

        Args:
            chunk: number of the chunk.
            slots: slots of consecutive chunks, as `read_slots` returned them.
            first: number of the chunk with which `slots` begins.

        Raises:
            ChecksumError: the slot differs from its record. Nothing was decoded.
            SchemaError: the slot's padding is not zero.
        """
        record, base = self.table.chunks[chunk], self.table.chunks[first].begin
        slot = slots[record.begin - base : record.end - base]
        got = xxh3_here(slot)
        if got != record.xxh3:
            error = ChecksumError(
                "stored bytes are damaged: xxh3", got=f"{got:016x}", expected=f"{record.xxh3:016x}"
            )
            raise error.located(**self.place(chunk))
        # Free padding would let one tensor have many valid files.
        if any(slot[record.stored_bytes :]):
            raise SchemaError("padding is not zero").located(**self.place(chunk))
        return slot[: record.stored_bytes]

    def check_chunks(self, first: int, last: int, slots: NDArray[np.uint8]) -> None:
        """Verifies chunks [first, last) as `stored_chunk` does, all together.

        Args:
            first: number of the first chunk.
            last: number behind the last chunk.
            slots: uint8 [slots_bytes(first, last)], their slots.

        Raises:
            ChecksumError, SchemaError: those of `stored_chunk` for the first chunk that is
                wrong.
        """
        records, ends = (
            self.table.records[first:last],
            self.table.offsets[first : last + 1] - self.table.offsets[first],
        )
        places, view = ends.tolist(), memoryview(slots)
        wrong = xxh3_each([view[begin:end] for begin, end in pairwise(places)]) != records["xxh3"]
        tails = slots.reshape(-1, limits.SLOT_ALIGNMENT)[
            ends[1:] // limits.SLOT_ALIGNMENT - 1
        ]  # padding is shorter
        used_bytes = records["stored_bytes"] - ends[1:] + limits.SLOT_ALIGNMENT + ends[:-1]
        wrong |= ((tails != 0) & (np.arange(limits.SLOT_ALIGNMENT) >= used_bytes[:, None])).any(
            axis=1
        )
        if wrong.any():
            chunk = first + int(wrong.argmax())
            # Raises with the place and the values of the chunk.
            self.stored_chunk(chunk, view, first)
            raise ChecksumError("stored bytes changed while they were checked").located(
                **self.place(chunk)
            )

    def decode_together(self, first: int, last: int, slots: memoryview) -> list[memoryview] | None:
        """Verifies and decodes chunks [first, last) with few calls.

        As `decode_run`, but for the codes' range (`check_codes`).

        Args:
            first: number of the first chunk.
            last: number behind the last chunk.
            slots: their slots, as `read_slots` returned them.

        Returns:
            The symbols of each chunk, or None where `decode_run` is to be asked: it knows every
            codec, and which chunk is damaged.
        """
        if self.tables is not None or first == last:
            return None
        records = self.table.chunks[first:last]
        try:
            symbols: list[memoryview] = [
                self.stored_chunk(chunk, slots, first) for chunk in range(first, last)
            ]
        except (ChecksumError, SchemaError):
            # `decode_run` meets the fault again and names the chunk.
            return None
        zstd_chunks = [
            number for number, record in enumerate(records) if record.codec == ZSTD.codec_id
        ]
        if zstd_chunks:
            base = records[0].begin
            spans = [
                (records[number].begin - base, records[number].stored_bytes)
                for number in zstd_chunks
            ]
            frames = ZSTD.decode_together(
                slots, spans, [records[number].raw_bytes for number in zstd_chunks]
            )
            if frames is None:
                return None
            for number, frame_symbols in zip(zstd_chunks, frames, strict=True):
                symbols[number] = frame_symbols
        return symbols

    def decode_chunk(self, chunk: int, slots: memoryview, first: int) -> NDArray[np.uint8]:
        """Verifies and decodes a chunk; arguments as for `stored_chunk`.

        Returns:
            uint8 [tile rows * tile columns] symbols, read-only.

        Raises:
            ChecksumError, SchemaError: see `stored_chunk`.
            DecodeError: the verified bytes do not decode to the declared symbols.
        """
        (outcome,) = self.decode_run(chunk, chunk + 1, slots, first)
        return sound(outcome)

    def decode_run(self, begin: int, end: int, slots: memoryview, first: int) -> Iterator[Decoded]:
        """Verifies and decodes chunks [begin, end), one after another.

        Those of codec `rans` all together at the start.

        Args:
            begin: number of the first chunk.
            end: number behind the last chunk.
            slots: slots of consecutive chunks, as `read_slots` returned them.
            first: number of the chunk with which `slots` begins.

        Yields:
            Per chunk the symbols as from `decode_chunk`, or its error.
        """
        together = self._decode_rans(begin, end, slots, first) if self.tables is not None else {}
        for chunk in range(begin, end):
            record = self.table.chunks[chunk]
            try:
                if record.codec == RANS_ID:
                    symbols = together.pop(chunk)
                    if isinstance(symbols, FormatError):
                        raise symbols
                else:
                    chunk_bytes = self.stored_chunk(chunk, slots, first)
                    symbols = np.frombuffer(
                        CODECS[record.codec].decode(chunk_bytes, record.raw_bytes), np.uint8
                    )
                if self.scales is not None and (chunk + 1) % self.table.planes == 0:
                    check_codes(
                        symbols.view(np.int8)
                    )  # of a wide tensor only the high plane is bounded
            except (ChecksumError, SchemaError, DecodeError) as exc:
                yield exc.located(**self.place(chunk))
                continue
            yield symbols

    def _decode_rans(
        self, begin: int, end: int, slots: memoryview, first: int
    ) -> dict[int, Decoded]:
        """Verifies and decodes the chunks of [begin, end) that use codec `rans`.

        Returns symbols or error of each.
        """
        assert self.tables is not None
        results: dict[int, Decoded] = {}
        rans_chunks: dict[int, rans.Coded] = {}
        for chunk in range(begin, end):
            record = self.table.chunks[chunk]
            if record.codec != RANS_ID:
                continue
            try:
                table = self.tables.table(*divmod(chunk, self.table.planes))
                rans_chunks[chunk] = rans.Coded(
                    self.stored_chunk(chunk, slots, first), record.raw_bytes, table
                )
            except (ChecksumError, SchemaError, DecodeError) as exc:
                results[chunk] = exc
        return results | dict(
            zip(rans_chunks, rans.decode_chunks(list(rans_chunks.values())), strict=True)
        )

    def place(self, chunk: int) -> dict[str, Any]:
        """Returns file, tensor, chunk and byte of a chunk, for errors."""
        byte = self.offset + int(self.table.offsets[chunk])
        return {"file": self.file.name, "tensor": self.record.name, "chunk": chunk, "byte": byte}


def tensor_matrix(record: CodedTensor) -> tuple[int, int]:
    """Returns the matrix [rows, cols] whose tiles the record's chunks are."""
    shape = tuple(record.shape)
    if isinstance(record, Int8Tensor):
        return channel_matrix(shape, record.channel_axis, record.channel_kind)
    return last_axis_matrix(shape)


def tile_steps(tensor: StoredTensor, tile: Tile) -> NDArray[np.float32]:
    """Returns the steps of a tile whose columns stand in the source's order.

    Float32 [rows, 1] or [1, cols]; [rows, cols] where columns have scales.
    """
    assert tensor.scales is not None
    if tensor.columns is None:
        return scales_for_tile(tensor.record, tensor.scales, tile)
    rows, cols = slice(tile.row, tile.row + tile.rows), slice(tile.col, tile.col + tile.cols)
    return step_sizes(tensor.scales[rows], tensor.columns.scales[cols])


def scales_for_tile(
    record: CodedTensor, scales: NDArray[np.float32], tile: Tile
) -> NDArray[np.float32]:
    """Returns the scales of a tile's channels, shaped to broadcast against its codes.

    [rows, 1] or [1, cols].
    """
    if isinstance(record, Int8Tensor) and record.channel_kind == "column":
        return scales[None, tile.col : tile.col + tile.cols]
    return scales[tile.row : tile.row + tile.rows, None]
