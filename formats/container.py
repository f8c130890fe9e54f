"""An opened container: manifest, shards and tensors, each checked before anything of it is used."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from codecllm.formats import limits
from codecllm.formats.checksums import check_xxh3, sha256_hex, sha256_of_descriptor
from codecllm.formats.codecs.rans_groups import GroupTables, max_tables_bytes, parse_group_tables
from codecllm.formats.errors import (
    ChecksumError,
    DecodeError,
    LayoutError,
    LimitError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
)
from codecllm.formats.files import Excerpt, SafeFile, as_path, describe_missing
from codecllm.formats.machine import without_garbage_collection
from codecllm.formats.manifest.manifest import MANIFEST_NAME, Manifest
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.formats.manifest.records import (
    AliasTensor,
    CodedTensor,
    FileRecord,
    Int8Tensor,
    RawTensor,
    StoredRecord,
)
from codecllm.formats.open_files import OpenFiles
from codecllm.formats.schemes.columns import Columns, make_columns
from codecllm.formats.schemes.int8 import check_steps
from codecllm.formats.shards.chunk_table import ChunkTable, parse_chunk_table
from codecllm.formats.shards.consistency import (
    check_expansion,
    check_geometry,
    check_shard_header,
    check_size,
    check_table_size,
)
from codecllm.formats.shards.safetensors_header import ShardHeader, read_header
from codecllm.formats.shards.side_reading import read_for_tensor, read_together, widened_scales
from codecllm.formats.shards.side_tensors import (
    CHUNKS,
    COL_GROUP,
    COL_SCALE,
    SCALE,
    SHAPE,
    TABLES,
    SideTensor,
    side_names,
)
from codecllm.formats.stored_tensor import PlainTensor, StoredTensor

CONTAINER_IS = f"a container is the folder with {MANIFEST_NAME} in it"
"""For an error where a file was given."""


class Container:
    """A container folder, opened for reading. Safe to share between threads.

    Opening reads and validates the manifest only. A shard's header is checked when the shard is
    first used, a tensor's side data when the tensor is, a chunk before it is decoded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        expected_manifest_sha256: str | None = None,
        max_expansion: float | None = None,
    ) -> None:
        """Opens `folder`.

        Args:
            folder: the container.
            expected_manifest_sha256: refuse any manifest but the one with this sha256 (64 hex
                digits). It pins every byte.
            max_expansion: how many times their stored size the tensors may have (SPEC.md 10); None
                takes `CODECLLM_MAX_EXPANSION` of the environment, or 100.

        Raises:
            UsageError: `folder` is no path.
            NotAContainerError: there is no manifest.
            FormatError: the manifest is not valid; see `parse_manifest`.
            LimitError: the tensors are too large for their stored bytes.
            ChecksumError: it is not the expected one.
        """
        self.folder = as_path(folder, "container")
        if not self.folder.is_dir():
            raise NotAContainerError(describe_missing(self.folder, CONTAINER_IS), file=str(folder))
        try:
            with SafeFile(self.folder, MANIFEST_NAME) as file:
                if file.size > limits.MANIFEST_BYTES:
                    raise LimitError("manifest is too long", file=MANIFEST_NAME, got=file.size)
                data = file.read(0, file.size)
        except TruncatedError as exc:
            raise NotAContainerError(f"folder holds no {MANIFEST_NAME}", file=str(folder)) from exc
        self.manifest_sha256 = sha256_hex(data)
        self.manifest_bytes = len(data)
        if (
            expected_manifest_sha256 is not None
            and self.manifest_sha256 != expected_manifest_sha256.lower()
        ):
            raise ChecksumError(
                "manifest is not the expected one",
                file=MANIFEST_NAME,
                got=self.manifest_sha256,
                expected=expected_manifest_sha256,
            )
        with without_garbage_collection():
            self.manifest: Manifest = parse_manifest(data)
        # Before anything is allocated by the sizes that the manifest declares.
        check_expansion(self.manifest, max_expansion)
        self.records = {record.name: record for record in self.manifest.tensors}
        self._files = OpenFiles(self.folder)
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
            check_size(file, record)
            if file.size > limits.SIDE_FILE_BYTES:
                raise LimitError("side file is too large to read", file=record.name, got=file.size)
            data = file.read(0, file.size)
        got = sha256_hex(data)
        if got != record.sha256:
            raise ChecksumError(
                "file differs from the manifest: sha256",
                file=record.name,
                got=got,
                expected=record.sha256,
            )
        return data

    def check_presence(self, record: FileRecord) -> None:
        """Checks that a listed file is there, is a regular file of this folder and has its size.

        Its content is not read.

        Raises:
            TruncatedError: it is missing or too short.
            LayoutError: it is too long.
            UnsafePathError: it is a link that leads elsewhere, or no regular file.
        """
        with SafeFile(self.folder, record.name) as file:
            check_size(file, record)

    def check_file(self, record: FileRecord) -> None:
        """Checks size and sha256 of a listed file of any size, reading it through.

        Errors as `read_side_file`.
        """
        with SafeFile(self.folder, record.name) as file:
            check_size(file, record)
            got, _ = sha256_of_descriptor(file.descriptor)
        if got != record.sha256:
            raise ChecksumError(
                "file differs from the manifest: sha256",
                file=record.name,
                got=got,
                expected=record.sha256,
            )

    def shard(self, number: int) -> tuple[SafeFile, ShardHeader]:
        """Opens shard `number` (from 0) and checks its size, its header and its tensors.

        Raises:
            FormatError: see SPEC.md 11.
        """
        with self._lock:
            if number not in self._shards:
                self._shards[number] = self._open_shard(number)
            return self._shards[number]

    def stored_record(self, name: str) -> StoredRecord:
        """Returns the record of a tensor, or of its target if it is an alias.

        Raises:
            SchemaError: there is no tensor of that name.
        """
        record = self.records.get(name)
        if isinstance(record, AliasTensor):
            # One step is enough: the manifest's validation refuses an alias of an alias.
            record = self.records[record.alias_of]
        if record is None:
            raise SchemaError("no such tensor", file=MANIFEST_NAME, tensor=name)
        assert not isinstance(record, AliasTensor)
        return record

    def span(self, name: str) -> tuple[int, int]:
        """Returns where the bytes of a tensor and its side tensors begin and end in their shard.

        Raises:
            SchemaError: there is no tensor of that name.
            FormatError: the shard is damaged.
        """
        record = self.stored_record(name)
        _, header = self.shard(record.shard)
        entries = [header.tensors[part] for part in (record.name, *side_names(record))]
        return min(entry.start for entry in entries), max(entry.end for entry in entries)

    def excerpt(self, shard: int, begin: int, end: int) -> Excerpt:
        """Reads bytes [begin, end) of shard `shard`, from 0; they are not checked.

        Raises:
            FormatError: the shard is damaged, or ends before.
        """
        file, _ = self.shard(shard)
        return Excerpt(file.name, begin, file.read(begin, end - begin))

    def tensor(self, name: str, excerpt: Excerpt | None = None) -> PlainTensor | StoredTensor:
        """Returns a tensor, ready to be read; an alias leads to its target.

        Args:
            name: its name.
            excerpt: bytes of the shard that hold the tensor's `span`; None reads the shard.

        Raises:
            SchemaError: there is no tensor of that name.
            FormatError: its shard or side data are damaged.
        """
        record = self.stored_record(name)
        opened, header = self.shard(record.shard)
        file = opened if excerpt is None else excerpt
        entry = header.tensors[record.name]
        if isinstance(record, RawTensor):
            return PlainTensor(record, file, entry.start)
        # The header's length of the table is compared with nothing yet: bounded before it is read.
        check_table_size(header, record, file.name)
        # The size of the rans tables is limited by the other side tensors, so they are read after
        # these.
        tables = TABLES.name_for(record.name)
        sides = read_together(
            file,
            [header.tensors[side] for side in side_names(record) if side != tables],
            record.name,
        )
        table_bytes = self._read_side(sides, header, record, CHUNKS)
        table = parse_chunk_table(
            table_bytes, payload_bytes=entry.bytes, file=file.name, tensor=record.name
        )
        check_geometry(record, table, file.name)
        table.check_low_bits(
            isinstance(record, Int8Tensor) and record.wide, file=file.name, tensor=record.name
        )
        shape = self._read_side(sides, header, record, SHAPE)
        if np.frombuffer(shape, "<i8").tolist() != record.shape:
            raise LayoutError(
                "stored shape differs from the manifest", file=file.name, tensor=record.name
            )
        scales, columns = (
            self._read_scales(sides, header, record)
            if isinstance(record, Int8Tensor)
            else (None, None)
        )
        group_tables = self._read_tables(file, header, record, table)
        return StoredTensor(record, file, entry.start, table, scales, group_tables, columns)

    def scales(self, name: str) -> tuple[NDArray[np.float32], Columns | None]:
        """Returns the scales of rows and of columns of an int8 tensor, as `tensor` does.

        Its chunk table is neither read nor checked.

        Raises:
            SchemaError: there is no tensor of that name.
            FormatError: its shard or its scales are damaged.
        """
        record = self.stored_record(name)
        assert isinstance(record, Int8Tensor)
        file, header = self.shard(record.shard)
        names = [side.name_for(record.name) for side in (SCALE, COL_SCALE, COL_GROUP)]
        entries = [header.tensors[side] for side in names if side in side_names(record)]
        return self._read_scales(read_together(file, entries, record.name), header, record)

    def _open_shard(self, number: int) -> tuple[SafeFile, ShardHeader]:
        record = self.manifest.shards[number]
        file = self._files.open(record.name)
        try:
            check_size(file, record)
            with without_garbage_collection():
                header = read_header(file, expected_xxh3=record.header_xxh3)
            check_shard_header(self.manifest, number, header)
        except BaseException:
            # No descriptor is left open, on Ctrl-C neither.
            file.close()
            raise
        return file, header

    def _read_side(
        self,
        file: SafeFile | Excerpt,
        header: ShardHeader,
        record: CodedTensor,
        side: SideTensor,
    ) -> bytes:
        entry = header.tensors[side.name_for(record.name)]
        checksum = side.checksum(record)
        assert checksum is not None
        data = read_for_tensor(file, entry.start, entry.bytes, record.name)
        check_xxh3(data, checksum, file.name, entry.name, entry.start)
        return data

    def _read_tables(
        self,
        file: SafeFile | Excerpt,
        header: ShardHeader,
        record: CodedTensor,
        chunks: ChunkTable,
    ) -> GroupTables | None:
        if record.xxh3.tables is None:
            return None
        got = header.tensors[TABLES.name_for(record.name)].bytes
        most = max_tables_bytes(len(chunks.records))
        if got > most:
            raise LayoutError(
                "rans tables are too large",
                file=file.name,
                tensor=record.name,
                got=got,
                expected=f"<= {most}",
            )
        data = self._read_side(file, header, record, TABLES)
        return parse_group_tables(data, chunks=chunks, file=file.name, tensor=record.name)

    def _read_scales(
        self, file: SafeFile | Excerpt, header: ShardHeader, record: Int8Tensor
    ) -> tuple[NDArray[np.float32], Columns | None]:
        scales = widened_scales(self._read_side(file, header, record, SCALE), record)
        columns = None
        if COL_SCALE.checksum(record) is not None:
            factors = widened_scales(self._read_side(file, header, record, COL_SCALE), record)
            groups = None
            if COL_GROUP.checksum(record) is not None:
                groups = np.frombuffer(self._read_side(file, header, record, COL_GROUP), np.uint8)
            columns = make_columns(factors, groups)
        try:
            check_steps(scales, columns.scales if columns is not None else None, record.wide)
        except DecodeError as exc:
            raise exc.located(file=file.name, tensor=record.name) from exc
        return scales, columns
