"""Add a side file to a container, staged or finished."""

from __future__ import annotations

from pathlib import Path

from codecllm.converter.write.signals import signals_wait
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.files import write_atomically
from codecllm.formats.manifest.manifest import MANIFEST_NAME, Manifest, pack_manifest
from codecllm.formats.manifest.records import FileRecord


def attach(folder: Path, manifest: Manifest, name: str, data: bytes) -> None:
    """Writes a file, then the manifest that lists it, which replaces the old one in one step.

    The container is whole before and after. A signal waits: a file without its manifest would stay.

    Args:
        folder: the container's folder.
        manifest: its manifest as it is.
        name: name of the file; a file of that name is replaced.
        data: the file's bytes.
    """
    record = FileRecord(name=name, bytes=len(data), sha256=sha256_hex(data))
    files = [other for other in manifest.files if other.name != name] + [record]
    # Sorted names make the manifest independent of the order in which side files were added.
    files.sort(key=lambda file: file.name)
    manifest_bytes = pack_manifest(manifest.model_copy(update={"files": files}))
    with signals_wait():
        write_atomically(folder / name, data)
        write_atomically(folder / MANIFEST_NAME, manifest_bytes)
