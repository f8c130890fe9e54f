"""What goes into the container beside the weights: an allow-list of the source's small files, and the config with our block."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codecllm.formats import limits
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.errors import LimitError
from codecllm.formats.files import SafeFile
from codecllm.formats.manifest.records import FileRecord

COPIED_NAMES = frozenset(
    {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "LICENSE",
        "LICENSE.txt",
        "LICENSE.md",
        "LICENCE",
        "NOTICE",
        "NOTICE.txt",
        "USE_POLICY.md",
    }
)
_COPIED_SUFFIXES = (".bpe.model", ".tiktoken")
_COPIED_FROM_SUBFOLDERS = ("config.json",)  # sentence-transformers: 1_Pooling/config.json


def copied_files(folder: Path) -> Iterator[str]:
    """Yields the names of the files that are copied as they are, sorted. Never code, never pickles."""
    names = []
    for path in folder.iterdir():
        if path.name in COPIED_NAMES or path.name.endswith(_COPIED_SUFFIXES):
            names.append(path.name)
        elif path.is_dir() and path.name[:1].isdigit():
            names += [
                f"{path.name}/{name}" for name in _COPIED_FROM_SUBFOLDERS if (path / name).is_file()
            ]
    yield from sorted(names)


def copy_side_files(source: Path, target: Path) -> list[FileRecord]:
    """Copies the allowed files and returns their records.

    Raises:
        UnsafePathError: one is a link that leads elsewhere.
        LimitError: one is too large to be what its name says.
    """
    records = []
    for name in copied_files(source):
        with SafeFile(source, name) as file:
            if file.size > limits.SIDE_FILE_BYTES:
                raise LimitError("side file is too large", file=name, got=file.size)
            records.append(write_listed(target, name, file.read(0, file.size)))
    return records


def write_listed(folder: Path, name: str, data: bytes) -> FileRecord:
    """Writes a new file and forces it to the disk; returns its record."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(name=name, bytes=len(data), sha256=sha256_hex(data))


def pack_config(config: dict[str, Any], scheme: str, version: str) -> bytes:
    """Returns the source's config with the block by which loaders know the weights, and refuse them without codecllm."""
    block = {"quant_method": "codecllm", "format_version": version, "scheme": scheme}
    return (
        json.dumps({**config, "quantization_config": block}, indent=2, ensure_ascii=False) + "\n"
    ).encode()


def pack_index(weight_map: dict[str, str], total_bytes: int, total_parameters: int) -> bytes:
    """Returns `model.safetensors.index.json`."""
    metadata = {"total_size": total_bytes, "total_parameters": total_parameters}
    return (
        json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=0)
        + "\n"
    ).encode()
