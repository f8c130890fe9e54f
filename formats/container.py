"""An opened container: manifest, shards and tensors, each checked before anything of it is used."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from codecllm.formats import limits
from codecllm.formats.checksums import sha256_hex, sha256_of_descriptor, xxh3, xxh3_each, xxh3_hex
from codecllm.formats.chunk_table import ChunkTable, parse_chunk_table
from codecllm.formats.codecs import CODECS, RANS_ID, ZSTD, rans
from codecllm.formats.columns import Columns, make_columns
from codecllm.formats.errors import (
    ChecksumError,
    DecodeError,
    FormatError,
    LayoutError,
    LimitError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
)
from codecllm.formats.files import SafeFile, refuse_foreign
from codecllm.formats.float_bits import float32_from_bits
from codecllm.formats.manifest import (
    MANIFEST_NAME,
    AliasTensor,
    CodedTensor,
    FileRecord,
    Int8Tensor,
    Manifest,
    RawTensor,
    parse_manifest,
)
from codecllm.formats.rans_groups import GroupTables, max_tables_bytes, parse_group_tables
from codecllm.formats.safetensors_header import ShardHeader, read_header
from codecllm.formats.schemes.int8 import check_codes, check_steps, step_sizes
from codecllm.formats.tiling import Grid, Tile, channel_matrix, last_axis_matrix

Decoded = NDArray[np.uint8] | ChecksumError | SchemaError | DecodeError
"""What became of a chunk: its symbols, or why there are none."""


def sound(decoded: Decoded) -> NDArray[np.uint8]:
    """Returns the symbols of a chunk, or raises its error."""
    if isinstance(decoded, FormatError):
        raise decoded
    return decoded


class ReadsAt(Protocol):
    """What a tensor's bytes are read from: an open file, or memory."""

    name: str

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills `target` from `offset`."""


@dataclass(frozen=True, slots=True)
class PlainTensor:
    """A tensor stored plainly: its record and where its bytes lie."""

    record: RawTensor
    file: SafeFile
    offset: int

    def read(self) -> bytearray:
        """Reads the tensor's bytes and checks them.

        Raises:
            ChecksumError: they differ from the manifest.
            TruncatedError: the shard ends early.
        """
        data = bytearray(self.record.source_bytes)
        self.file.read_into(self.offset, memoryview(data))
        _check_xxh3(data, self.record.xxh3, self.file.name, self.record.name, self.offset)
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
        """Tiles that give whole rows in the source's order only together: a row of tiles, or 1 where each tile does so."""
        return 1 if self.table.grid.in_source_order and not self.permuted else self.table.grid.across

    @property
    def permuted(self) -> bool:
        """Whether columns are stored in another order than the source's."""
        return self.columns is not None and self.columns.order is not None

    def part(self, tile: int) -> Tile:
        """Returns the rectangle of the source's matrix that `tiles_together` tiles from `tile` on hold."""
        found = self.table.grid.tile(tile)
        return found if self.tiles_together == 1 else Tile(found.row, 0, found.rows, self.table.grid.cols)

    def in_order(self, part: NDArray[np.uint8], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Returns symbols [rows, cols] of whole rows, given with the columns as they are stored, in the source's order.

        Args:
            part: the symbols; what is returned where columns are stored in the source's order.
            out: receives them otherwise, of the same shape; None allocates.
        """
        if self.columns is None or self.columns.places is None:
            return part
        return part.take(self.columns.places, axis=1, out=out, mode="clip")

    def slots_bytes(self, first: int, last: int) -> int:
        """Size of the slots of chunks [first, last)."""
        return int(self.table.offsets[last] - self.table.offsets[first])

    def read_slots(self, first: int, last: int, buffer: bytearray) -> memoryview:
        """Reads the slots of chunks [first, last) with one read into the head of `buffer` (large enough); unchecked."""
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
        got = xxh3(slot)
        if got != record.xxh3:
            error = ChecksumError("stored bytes are damaged: xxh3", got=f"{got:016x}", expected=f"{record.xxh3:016x}")
            raise error.located(**self.place(chunk))
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
            ChecksumError, SchemaError: what `stored_chunk` raises for the first chunk that is wrong.
        """
        records, ends = self.table.records[first:last], self.table.offsets[first : last + 1] - self.table.offsets[first]
        places, view = ends.tolist(), memoryview(slots)
        wrong = xxh3_each([view[begin:end] for begin, end in pairwise(places)]) != records["xxh3"]
        tails = slots.reshape(-1, limits.SLOT_ALIGNMENT)[ends[1:] // limits.SLOT_ALIGNMENT - 1]  # padding is shorter
        used = records["stored_bytes"] - ends[1:] + limits.SLOT_ALIGNMENT + ends[:-1]
        wrong |= ((tails != 0) & (np.arange(limits.SLOT_ALIGNMENT) >= used[:, None])).any(axis=1)
        if wrong.any():
            chunk = first + int(wrong.argmax())
            self.stored_chunk(chunk, view, first)
            raise ChecksumError("stored bytes changed while they were checked").located(**self.place(chunk))

    def decode_together(self, first: int, last: int, slots: memoryview) -> list[memoryview] | None:
        """Verifies and decodes chunks [first, last) with few calls: as `decode_run`, but for the codes' range (`check_codes`).

        Args:
            first: number of the first chunk.
            last: number behind the last chunk.
            slots: their slots, as `read_slots` returned them.

        Returns:
            The symbols of each chunk, or None where `decode_run` is to be asked: it knows every codec, and which chunk is
            damaged.
        """
        if self.tables is not None or first == last:
            return None
        records = self.table.chunks[first:last]
        try:
            symbols: list[memoryview] = [self.stored_chunk(chunk, slots, first) for chunk in range(first, last)]
        except (ChecksumError, SchemaError):
            return None
        coded = [number for number, record in enumerate(records) if record.codec == ZSTD.codec_id]
        if coded:
            base = records[0].begin
            spans = [(records[number].begin - base, records[number].stored_bytes) for number in coded]
            frames = ZSTD.decode_together(slots, spans, [records[number].raw_bytes for number in coded])
            if frames is None:
                return None
            for number, decoded in zip(coded, frames, strict=True):
                symbols[number] = decoded
        return symbols

    def decode_chunk(self, chunk: int, slots: memoryview, first: int) -> NDArray[np.uint8]:
        """Verifies and decodes a chunk; arguments as for `stored_chunk`.

        Returns:
            uint8 [tile rows * tile columns] symbols, read-only.

        Raises:
            ChecksumError, SchemaError: see `stored_chunk`.
            DecodeError: the verified bytes do not decode to the declared symbols.
        """
        (decoded,) = self.decode_run(chunk, chunk + 1, slots, first)
        return sound(decoded)

    def decode_run(self, begin: int, end: int, slots: memoryview, first: int) -> Iterator[Decoded]:
        """Verifies and decodes chunks [begin, end), one after another; those of codec `rans` all together at the start.

        Args:
            begin: number of the first chunk.
            end: number behind the last chunk.
            slots: slots of consecutive chunks, as `read_slots` returned them.
            first: number of the chunk with which `slots` begins.

        Yields:
            Per chunk what `decode_chunk` returns, or the error that it raises.
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
                    stored = self.stored_chunk(chunk, slots, first)
                    symbols = np.frombuffer(CODECS[record.codec].decode(stored, record.raw_bytes), np.uint8)
                if self.scales is not None and (chunk + 1) % self.table.planes == 0:
                    check_codes(symbols.view(np.int8))  # of a wide tensor only the high plane is bounded
            except (ChecksumError, SchemaError, DecodeError) as exc:
                yield exc.located(**self.place(chunk))
                continue
            yield symbols

    def _decode_rans(self, begin: int, end: int, slots: memoryview, first: int) -> dict[int, Decoded]:
        """Verifies and decodes the chunks of [begin, end) that use codec `rans`; returns symbols or error of each."""
        assert self.tables is not None
        results: dict[int, Decoded] = {}
        coded: dict[int, rans.Coded] = {}
        for chunk in range(begin, end):
            record = self.table.chunks[chunk]
            if record.codec != RANS_ID:
                continue
            try:
                table = self.tables.table(*divmod(chunk, self.table.planes))
                coded[chunk] = rans.Coded(self.stored_chunk(chunk, slots, first), record.raw_bytes, table)
            except (ChecksumError, SchemaError, DecodeError) as exc:
                results[chunk] = exc
        return results | dict(zip(coded, rans.decode_chunks(list(coded.values())), strict=True))

    def place(self, chunk: int) -> dict[str, Any]:
        """Returns file, tensor, chunk and byte of a chunk, for errors."""
        byte = self.offset + int(self.table.offsets[chunk])
        return {"file": self.file.name, "tensor": self.record.name, "chunk": chunk, "byte": byte}


class Container:
    """A container folder, opened for reading. Safe to share between threads.

    Opening reads and validates the manifest only. A shard's header is checked when the shard is first used, a tensor's side
    data when the tensor is, a chunk before it is decoded.
    """

    def __init__(self, folder: str | Path, *, expected_manifest_sha256: str | None = None) -> None:
        """Opens `folder`.

        Args:
            folder: the container.
            expected_manifest_sha256: refuse any manifest but the one with this sha256 (64 hex digits). It pins every byte.

        Raises:
            NotAContainerError: there is no manifest.
            FormatError: the manifest is not valid; see `parse_manifest`.
            ChecksumError: it is not the expected one.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotAContainerError("no such folder", file=str(folder))
        try:
            with SafeFile(self.folder, MANIFEST_NAME) as file:
                if file.size > limits.MANIFEST_BYTES:
                    raise LimitError("manifest is too long", file=MANIFEST_NAME, got=file.size)
                data = file.read(0, file.size)
        except TruncatedError as exc:
            raise NotAContainerError(f"folder holds no {MANIFEST_NAME}", file=str(folder)) from exc
        self.manifest_sha256 = sha256_hex(data)
        self.manifest_bytes = len(data)
        if expected_manifest_sha256 is not None and self.manifest_sha256 != expected_manifest_sha256.lower():
            raise ChecksumError(
                "manifest is not the expected one",
                file=MANIFEST_NAME,
                got=self.manifest_sha256,
                expected=expected_manifest_sha256,
            )
        self.manifest: Manifest = parse_manifest(data)
        self.records = {record.name: record for record in self.manifest.tensors}
        self._shards: dict[int, tuple[SafeFile, ShardHeader]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the shards."""
        with self._lock:
            for file, _ in self._shards.values():
                file.close()
            self._shards.clear()

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def decoding_threads(self, workers: int | None) -> int:
        """Returns how many threads should decode: `workers`, or where that is None one per core, and for `rans` 16 at least."""
        if workers is not None:
            return workers
        cores = max(1, len(os.sched_getaffinity(0)))
        return max(cores, rans.THREADS) if rans.NAME in self.manifest.required_features else cores

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards and the manifest: the denominator of the ratio."""
        return self.manifest_bytes + sum(shard.bytes for shard in self.manifest.shards)

    def read_side_file(self, record: FileRecord) -> bytes:
        """Reads a listed side file and checks its sha256.

        Raises:
            TruncatedError: it is missing or has a wrong size.
            ChecksumError: its content differs.
        """
        with SafeFile(self.folder, record.name) as file:
            _check_size(file, record)
            if file.size > limits.SIDE_FILE_BYTES:
                raise LimitError("side file is too large to read", file=record.name, got=file.size)
            data = file.read(0, file.size)
        got = sha256_hex(data)
        if got != record.sha256:
            raise ChecksumError("file differs from the manifest: sha256", file=record.name, got=got, expected=record.sha256)
        return data

    def check_presence(self, record: FileRecord) -> None:
        """Checks that a listed file is there, is a regular file of this folder and has its size; its content is not read.

        Raises:
            TruncatedError: it is missing or too short.
            LayoutError: it is too long.
            UnsafePathError: it is a link that leads elsewhere, or no regular file.
        """
        with SafeFile(self.folder, record.name) as file:
            _check_size(file, record)

    def check_file(self, record: FileRecord) -> None:
        """Checks size and sha256 of a listed file of any size, reading it through. Errors as `read_side_file`."""
        with SafeFile(self.folder, record.name) as file:
            _check_size(file, record)
            got, _ = sha256_of_descriptor(file.descriptor)
        if got != record.sha256:
            raise ChecksumError("file differs from the manifest: sha256", file=record.name, got=got, expected=record.sha256)

    def shard(self, number: int) -> tuple[SafeFile, ShardHeader]:
        """Opens shard `number` (from 0) and checks its size, its header and that it holds what the manifest says.

        Raises:
            FormatError: see SPEC.md 11.
        """
        with self._lock:
            if number not in self._shards:
                self._shards[number] = self._open_shard(number)
            return self._shards[number]

    def tensor(self, name: str) -> PlainTensor | StoredTensor:
        """Returns a tensor, ready to be read; an alias leads to its target.

        Raises:
            SchemaError: there is no tensor of that name.
            FormatError: its shard or side data are damaged.
        """
        record = self.records.get(name)
        if isinstance(record, AliasTensor):
            record = self.records[record.alias_of]
        if record is None:
            raise SchemaError("no such tensor", file=MANIFEST_NAME, tensor=name)
        assert not isinstance(record, AliasTensor)
        file, header = self.shard(record.shard)
        entry = header.tensors[record.name]
        if isinstance(record, RawTensor):
            return PlainTensor(record, file, entry.start)
        table_bytes = self._read_side(file, header, record, "chunks", record.xxh3.chunks)
        table = parse_chunk_table(table_bytes, payload_bytes=entry.bytes, file=file.name, tensor=record.name)
        _check_geometry(record, table, file.name)
        shape = self._read_side(file, header, record, "shape", record.xxh3.shape)
        if np.frombuffer(shape, "<i8").tolist() != record.shape:
            raise LayoutError("stored shape differs from the manifest", file=file.name, tensor=record.name)
        scales, columns = self._read_scales(file, header, record) if isinstance(record, Int8Tensor) else (None, None)
        tables = self._read_tables(file, header, record, table)
        return StoredTensor(record, file, entry.start, table, scales, tables, columns)

    def _open_shard(self, number: int) -> tuple[SafeFile, ShardHeader]:
        record = self.manifest.shards[number]
        file = SafeFile(self.folder, record.name)
        try:
            if file.size != record.bytes:
                refuse_foreign(file)
            _check_size(file, record)
            header = read_header(file)
            check_shard_header(self.manifest, number, header)
        except BaseException:
            file.close()
            raise
        return file, header

    def _read_side(self, file: SafeFile, header: ShardHeader, record: CodedTensor, side: str, checksum: str) -> bytes:
        entry = header.tensors[f"{record.name}_{side}"]
        data = file.read(entry.start, entry.bytes)
        _check_xxh3(data, checksum, file.name, entry.name, entry.start)
        return data

    def _read_tables(self, file: SafeFile, header: ShardHeader, record: CodedTensor, chunks: ChunkTable) -> GroupTables | None:
        if record.xxh3.tables is None:
            return None
        got, most = header.tensors[record.name + "_tables"].bytes, max_tables_bytes(len(chunks.records))
        if got > most:
            raise LayoutError("rans tables are too large", file=file.name, tensor=record.name, got=got, expected=f"<= {most}")
        data = self._read_side(file, header, record, "tables", record.xxh3.tables)
        return parse_group_tables(data, chunks=chunks, file=file.name, tensor=record.name)

    def _read_scales(
        self, file: SafeFile, header: ShardHeader, record: Int8Tensor
    ) -> tuple[NDArray[np.float32], Columns | None]:
        assert record.xxh3.scale is not None
        scales = widened_scales(self._read_side(file, header, record, "scale", record.xxh3.scale), record)
        columns = None
        if record.xxh3.col_scale is not None:
            factors = widened_scales(self._read_side(file, header, record, "col_scale", record.xxh3.col_scale), record)
            groups = None
            if record.xxh3.col_group is not None:
                groups = np.frombuffer(self._read_side(file, header, record, "col_group", record.xxh3.col_group), np.uint8)
            columns = make_columns(factors, groups)
        try:
            check_steps(scales, columns.scales if columns is not None else None, record.wide)
        except DecodeError as exc:
            raise exc.located(file=file.name, tensor=record.name) from exc
        return scales, columns


def check_shard_header(manifest: Manifest, number: int, header: ShardHeader) -> None:
    """Checks that a shard's header has its checksum and holds what the manifest places in shard `number`, and nothing else.

    Raises:
        ChecksumError: the header differs from the manifest.
        LayoutError: a tensor is missing, too many, or of another type.
    """
    file = manifest.shards[number].name
    _check_xxh3(header.raw, manifest.shards[number].header_xxh3, file, None, 0)
    found = {entry.name: (entry.dtype.name, list(entry.shape)) for entry in header.tensors.values()}
    expected: dict[str, tuple[str, list[int] | None]] = {}
    for record in manifest.tensors:
        if isinstance(record, AliasTensor) or record.shard != number:
            continue
        if isinstance(record, RawTensor):
            expected[record.name] = (record.dtype, record.shape)
            continue
        expected[record.name] = ("U8", None)
        expected[record.name + "_shape"] = ("I64", [len(record.shape)])
        expected[record.name + "_chunks"] = ("U8", None)
        if record.tables_bytes is not None:
            expected[record.name + "_tables"] = ("U8", [record.tables_bytes])
        if isinstance(record, Int8Tensor):
            rows, cols = tensor_matrix(record)
            scale_dtype = record.scale_dtype or "F32"
            expected[record.name + "_scale"] = (scale_dtype, [rows if record.channel_kind == "row" else cols])
            if record.xxh3.col_scale is not None:
                expected[record.name + "_col_scale"] = (scale_dtype, [cols])
            if record.xxh3.col_group is not None:
                expected[record.name + "_col_group"] = ("U8", [cols])
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise LayoutError("shard lacks a tensor that the manifest places there", file=file, tensor=name)
        got_dtype, got_shape = found[name]
        if got_dtype != dtype or (got_shape != shape if shape is not None else len(got_shape) != 1):
            got = f"{got_dtype} {got_shape}"
            raise LayoutError("stored type differs from the manifest", file=file, tensor=name, got=got, expected=dtype)
    for name in found:
        if name not in expected:
            raise LayoutError("shard holds a tensor that the manifest does not place there", file=file, tensor=name)


def widened_scales(data: bytes, record: Int8Tensor) -> NDArray[np.float32]:
    """Returns the bytes of a side tensor of scales, of rows or of columns, as float32; values are not looked at."""
    if record.scale_dtype == "BF16":
        return float32_from_bits(np.frombuffer(data, "<u2"), "BF16")
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)


def tensor_matrix(record: CodedTensor) -> tuple[int, int]:
    """Returns the matrix [rows, cols] whose tiles the record's chunks are."""
    shape = tuple(record.shape)
    if isinstance(record, Int8Tensor):
        return channel_matrix(shape, record.channel_axis, record.channel_kind)
    return last_axis_matrix(shape)


def tile_steps(tensor: StoredTensor, tile: Tile) -> NDArray[np.float32]:
    """Returns the steps of a tile whose columns stand in the source's order, to broadcast against its codes.

    Float32 [rows, 1] or [1, cols]; [rows, cols] where columns have scales.
    """
    assert tensor.scales is not None
    if tensor.columns is None:
        return scales_for_tile(tensor.record, tensor.scales, tile)
    rows, cols = slice(tile.row, tile.row + tile.rows), slice(tile.col, tile.col + tile.cols)
    return step_sizes(tensor.scales[rows], tensor.columns.scales[cols])


def scales_for_tile(record: CodedTensor, scales: NDArray[np.float32], tile: Tile) -> NDArray[np.float32]:
    """Returns the scales of a tile's channels, shaped to broadcast against its codes: [rows, 1] or [1, cols]."""
    if isinstance(record, Int8Tensor) and record.channel_kind == "column":
        return scales[None, tile.col : tile.col + tile.cols]
    return scales[tile.row : tile.row + tile.rows, None]


def _check_geometry(record: CodedTensor, table: ChunkTable, file: str) -> None:
    rows, cols = tensor_matrix(record)
    expected = Grid(rows, cols, record.tile[0], record.tile[1])
    if table.grid != expected or table.planes != len(record.planes):
        raise LayoutError(
            "chunk table and manifest disagree",
            file=file,
            tensor=record.name,
            got=str(table.grid),
            expected=str(expected),
        )
    _check_rans_planes(record, table, file)
    stored = table.records["stored_bytes"].reshape(-1, table.planes).sum(axis=0, dtype=np.int64).tolist()
    if stored != [plane.stored_bytes for plane in record.planes]:
        raise LayoutError("chunk table and manifest disagree on stored bytes", file=file, tensor=record.name, got=stored)


def _check_rans_planes(record: CodedTensor, table: ChunkTable, file: str) -> None:
    """Refuses a chunk of codec `rans` in a plane for which the manifest does not announce it."""
    coded = table.records["codec"] == RANS_ID
    if not coded.any():
        return
    announced = np.array([plane.codec == rans.NAME for plane in record.planes])
    wrong = coded.reshape(-1, table.planes) & ~announced
    if wrong.any():
        chunk = int(wrong.reshape(-1).argmax())
        raise LayoutError("chunk uses codec 'rans', its plane does not", file=file, tensor=record.name, chunk=chunk)


def _check_size(file: SafeFile, record: FileRecord) -> None:
    if file.size < record.bytes:
        raise TruncatedError("file is too short", file=record.name, got=file.size, expected=f"{record.bytes} bytes")
    if file.size > record.bytes:
        raise LayoutError("file is too long", file=record.name, got=file.size, expected=f"{record.bytes} bytes")


def _check_xxh3(data: Any, expected: str, file: str, tensor: str | None, byte: int) -> None:
    got = xxh3_hex(data)
    if got != expected:
        what = "header" if tensor is None else "stored bytes"
        raise ChecksumError(
            f"{what} differ from the manifest: xxh3", file=file, tensor=tensor, byte=byte, got=got, expected=expected
        )
