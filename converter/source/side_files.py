"""Writes the files of a container beside the weights.

Copies of the source's files, the config with our block, and the index.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codecllm.converter.source.files import SourceFile
from codecllm.converter.source.modules import MODULES_NAME, Modules
from codecllm.converter.source.selection import SideFiles
from codecllm.formats import limits
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.errors import LimitError
from codecllm.formats.manifest.manifest import ORIGINAL_KEY, QUANT_METHOD
from codecllm.formats.manifest.records import FileRecord


def copy_side_files(
    repository: Path, side_files: SideFiles, modules: Modules, target: Path
) -> list[FileRecord]:
    """Copies the selected files and returns their records.

    Raises:
        TruncatedError: one is gone.
        UnsafePathError: one is no regular file any more.
        LimitError: one has grown too large.
    """
    records = []
    for name, source_name in side_files.copied.items():
        if name == MODULES_NAME and modules.document is not None:
            records.append(write_listed(target, name, modules.document))
            continue
        with SourceFile(repository, source_name) as file:
            if file.size > limits.SIDE_FILE_BYTES:
                raise LimitError("side file is too large", file=name, got=file.size)
            records.append(write_listed(target, name, file.read(0, file.size)))
    return records


def write_listed(folder: Path, name: str, data: bytes) -> FileRecord:
    """Writes a new file and forces it to the disk; returns its record."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Exclusive: a second file of the same name would be a fault of the selection.
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        # The manifest will list the file, so it has to be on the disk before.
        os.fsync(file.fileno())
    return FileRecord(name=name, bytes=len(data), sha256=sha256_hex(data))


def pack_config(
    config: Mapping[str, Any], scheme: str, version: str, original: Mapping[str, Any] | None = None
) -> bytes:
    """Returns the source's config with our quantization block.

    By the block loaders know the weights, and without codecllm they refuse them.

    Args:
        config: the source's; its own `quantization_config` is replaced, and what it says of weight
            files (`transformers_weights`) is left out: the container's have names of their own.
        scheme: of the container.
        version: of the format.
        original: the quantization block of the source whose tensors the container keeps, or None.
    """
    block: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "format_version": version,
        "scheme": scheme,
    }
    if original is not None:
        block[ORIGINAL_KEY] = original
    entries = {key: value for key, value in config.items() if key != "transformers_weights"}
    entries["quantization_config"] = block
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()


def pack_index(weight_map: dict[str, str], total_bytes: int, total_parameters: int) -> bytes:
    """Returns `model.safetensors.index.json`."""
    metadata = {"total_size": total_bytes, "total_parameters": total_parameters}
    return (
        json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=0)
        + "\n"
    ).encode()
