"""Containers whose tensors a fuzz target changes, hundreds of times a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from codecllm.formats.checksums import sha256_hex
from codecllm.formats.container import Container
from codecllm.formats.errors import CodecLLMError
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.reference import read_tensor_bytes
from tests import tampering
from tests.malformed import builders

_MAKERS: tuple[Callable[[Path], Path], ...] = (
    builders.make_container,
    builders.make_rans_container,
    builders.make_columns_container,
    builders.make_flags_container,
)


@dataclass(frozen=True)
class Change:
    """One byte: `value` at `place`, modulo the size of the tensor, of a tensor of the shard."""

    tensor: str
    place: int
    value: int


class Original:
    """A container as it was made, to be changed again and again."""

    def __init__(self, folder: Path) -> None:
        """Reads a container of one shard."""
        self.folder = folder
        self.tensors, _ = builders.split_shard(folder)
        shard = (folder / builders.SHARD).read_bytes()
        body = sum(len(content) for _, _, content in self.tensors.values())
        self._head = shard[: len(shard) - body]
        self._manifest = (folder / MANIFEST_NAME).read_bytes()

    def read_changed(self, changes: list[Change]) -> None:
        """Reads each tensor that the changes touch: bytes of the right size, or an error of ours.

        All checksums are made to fit. A tensor that they do not touch has the bytes and records
        that it had, so that to decode it would tell nothing.
        """
        tensors = {
            name: (dtype, shape, bytearray(content))
            for name, (dtype, shape, content) in self.tensors.items()
        }
        for change in changes:
            if content := tensors[change.tensor][2]:
                content[change.place % len(content)] = change.value
        touched = [
            name
            for name in tensors
            if any(c.tensor == name or c.tensor.startswith(f"{name}_") for c in changes)
        ]
        for name in touched:
            if f"{name}_chunks" in tensors:
                with suppress(ValueError, OverflowError):
                    builders.fix_chunks(tensors, name)
        self._write(tensors)
        with suppress(CodecLLMError), Container(self.folder) as container:
            for name in touched:
                if record := container.records.get(name):
                    with suppress(CodecLLMError):
                        assert len(read_tensor_bytes(container, name)) == record.source_bytes

    def _write(self, tensors: builders.Tensors) -> None:
        shard = self._head + b"".join(bytes(content) for _, _, content in tensors.values())
        document = json.loads(self._manifest)
        document["shards"][0]["sha256"] = sha256_hex(shard)
        builders.fix_sides_of(document, tensors)
        (self.folder / builders.SHARD).write_bytes(shard)
        (self.folder / MANIFEST_NAME).write_bytes(tampering.sealed(document))


def make_originals(base: Path) -> list[Original]:
    """Makes a container of each kind: both codecs, scales of rows and of columns, booleans."""
    return [Original(make(base / make.__name__)) for make in _MAKERS]
