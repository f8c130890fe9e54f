"""Ways to damage a container on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codecllm.formats.checksums import sha256_hex
from codecllm.formats.manifest.manifest import MANIFEST_NAME, source_features


def copy_of(container: Path, target: Path) -> Path:
    """Copies a container to `target` and returns it."""
    shutil.copytree(container, target)
    return target


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Flips one bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest as JSON values."""
    document: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_bytes())
    return document


def reseal(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the manifest and gives it a fitting seal, as an attacker or a broken writer would."""
    document = read_manifest(folder)
    edit(document)
    (folder / MANIFEST_NAME).write_bytes(sealed(document))


def sealed(document: dict[str, Any]) -> bytes:
    """Returns the file of a manifest's JSON values, whose seal is removed and made anew."""
    document.pop("manifest_sha256", None)
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)[:-1].encode() + b",\n"
    return text + f'"manifest_sha256":"{sha256_hex(text)}"}}\n'.encode()


def replace_listed(folder: Path, name: str, data: bytes) -> None:
    """Replaces a listed file and its record, so that only the content itself can give it away."""

    def edit(document: dict[str, Any]) -> None:
        record = next(record for record in document["files"] if record["name"] == name)
        record.update(bytes=len(data), sha256=sha256_hex(data))

    (folder / name).write_bytes(data)
    reseal(folder, edit)


def add_listed(folder: Path, name: str, data: bytes) -> None:
    """Adds a side file, its record and the features that its name needs."""

    def edit(document: dict[str, Any]) -> None:
        record = {"name": name, "bytes": len(data), "sha256": sha256_hex(data)}
        document["files"] = sorted([*document["files"], record], key=lambda each: each["name"])
        features = document["required_features"]
        features += [one for one in source_features([name], None) if one not in features]

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    reseal(folder, edit)


def payload_place(folder: Path, tensor: str, chunk: int = 0) -> tuple[Path, int]:
    """Returns the shard and the byte at which a chunk of a coded tensor begins."""
    from codecllm.formats.container import Container
    from codecllm.formats.stored_tensor import StoredTensor

    with Container(folder) as container:
        stored = container.tensor(tensor)
        assert isinstance(stored, StoredTensor)
        return folder / stored.file.name, stored.offset + int(stored.table.offsets[chunk])
