"""The journal of a conversion: the shards that are finished.

With it the same command goes on after a kill.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from codecllm.formats import limits
from codecllm.formats.checksums import sha256_of_descriptor, xxh3_hex
from codecllm.formats.errors import FormatError
from codecllm.formats.files import SafeFile, read_file
from codecllm.formats.manifest.records import ShardRecord, StoredRecord

_TENSORS: TypeAdapter[list[StoredRecord]] = TypeAdapter(
    list[Annotated[StoredRecord, Field(discriminator="scheme")]]
)
# The records of a journal are those of the manifest.
_MAX_BYTES = 2 * limits.MANIFEST_BYTES


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that is whole and on the disk: its record and those of its tensors, in order."""

    record: ShardRecord
    tensors: list[StoredRecord]


class Journal:
    """A file of lines `xxh3 json`: first the conversion's fingerprint, then each finished shard.

    Safe to share between threads.

    A line that was not written whole is dropped with all behind it: those shards are done again.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        """Keeps the journal at `path`; the shards are in `folder`."""
        self._path = path
        self._folder = folder
        self._lock = threading.Lock()
        self.finished: dict[str, FinishedShard] = {}

    def begin(self, fingerprint: str | None) -> bool:
        """Goes on with the conversion of this fingerprint, or begins it anew.

        Args:
            fingerprint: equal for conversions that write the same bytes; None for one that cannot
                be repeated.

        Returns:
            Whether the journal is of the same conversion. Then `finished` has the shards that are
            whole: each was read and compared with its sha256. Otherwise the caller removes all that
            is in the folder.
        """
        data = self._read() if fingerprint is not None else b""
        # Compared as bytes: a stranger's journal is not parsed.
        first = _pack({"fingerprint": fingerprint})
        same = data.startswith(first)
        for line in _whole_lines(data[len(first) :]) if same else []:
            shard = self._checked(line)
            if shard is not None:
                self.finished[shard.record.name] = shard
        # Written anew: lines behind one that is cut off would never be read.
        self._path.unlink(missing_ok=True)
        if fingerprint is not None:
            self._append({"fingerprint": fingerprint})
            for shard in self.finished.values():
                self._append(_line_of(shard))
        return same

    def add(self, shard: FinishedShard) -> None:
        """Notes a shard whose file was forced to the disk."""
        # Without a fingerprint there is no journal: the conversion cannot be repeated.
        if self._path.exists():
            self._append(_line_of(shard))

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock, open(self._path, "ab") as file:
            file.write(_pack(line))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> bytes:
        """Returns the bytes of the file; none where it is no regular file, or too long for one."""
        try:
            return read_file(self._path.parent, self._path.name, _MAX_BYTES)
        except (FormatError, OSError):
            return b""

    def _checked(self, line: Any) -> FinishedShard | None:
        """Returns the shard of a line if its file is there with every byte."""
        try:
            record = ShardRecord.model_validate(line["shard"])
            tensors = _TENSORS.validate_python(line["tensors"])
            with SafeFile(self._folder, record.name) as file, file.opened() as descriptor:
                digest, size = sha256_of_descriptor(descriptor)
        except (FormatError, ValidationError, KeyError, TypeError):
            return None
        # After a crash of the machine a file may have its size and not its bytes.
        whole = (digest, size) == (record.sha256, record.bytes)
        return FinishedShard(record, tensors) if whole else None


def _line_of(shard: FinishedShard) -> dict[str, Any]:
    tensors = [record.model_dump(mode="json", exclude_none=True) for record in shard.tensors]
    return {"shard": shard.record.model_dump(mode="json"), "tensors": tensors}


def _pack(line: dict[str, Any]) -> bytes:
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode()
    return xxh3_hex(text).encode() + b" " + text + b"\n"


def _whole_lines(data: bytes) -> Iterator[Any]:
    for line in data.split(b"\n")[:-1]:
        checksum, _, text = line.partition(b" ")
        if xxh3_hex(text).encode() != checksum:
            return
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            return
