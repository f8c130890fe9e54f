"""Side files of two models: which of those that transformers may read say other things."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from codecllm.converter.source.files import SourceFile, read_bytes
from codecllm.converter.source.source import SourceModel
from codecllm.formats import limits
from codecllm.formats.checksums import sha256_of_descriptor
from codecllm.formats.container import Container
from codecllm.formats.manifest.manifest import (
    BASELINE_NAME,
    CODE_SUFFIX,
    CONFIG_NAME,
    INDEX_NAME,
    LOAD_REPORT_NAME,
    ORIGINAL_KEY,
    QUANT_METHOD,
)
from codecllm.formats.manifest.records import FileRecord
from codecllm.loader.hf.side_limits import VOCABULARY_BYTES, VOCABULARY_VALUES

_OURS = frozenset({BASELINE_NAME, LOAD_REPORT_NAME, INDEX_NAME})
_BLOCK = "quantization_config"
_NO_FACTS = (
    "transformers_version",
    "transformers_weights",
    "_name_or_path",
)
"""Entries of config.json that differ between a model and its container, or say who wrote it."""

# What no class reads. Names of what classes do read would never be complete.
_DOCUMENTS = frozenset(
    [
        *("", ".csv", ".gif", ".html", ".ipynb", ".jpeg", ".jpg", ".log", ".md", ".pdf", ".png"),
        *(".rst", ".sh", ".svg", ".webp"),
    ]
)


@dataclass(frozen=True, slots=True)
class ComparedFile:
    """A side file of one model.

    Attributes:
        sha256: returns the digest of its content, as hex digits.
        read: returns its content, of at most `limits.SIDE_FILE_BYTES` bytes.

    Both raise a CodecLLMError where the file is no regular file, or not the one that the manifest
    lists.
    """

    sha256: Callable[[], str]
    read: Callable[[], bytes]


def files_of_container(container: Container) -> dict[str, ComparedFile]:
    """Returns a container's side files by name."""
    return {
        record.name: ComparedFile(
            partial(_listed_sha256, container, record), partial(container.read_side_file, record)
        )
        for record in container.manifest.files
    }


def files_of_source(source: SourceModel) -> dict[str, ComparedFile]:
    """Returns a plain model's side files by their names in a container."""
    places = {name: (source.repository, path) for name, path in source.side_files.copied.items()}
    files = {
        name: ComparedFile(
            partial(_sha256, *place), partial(read_bytes, *place, limits.SIDE_FILE_BYTES)
        )
        for name, place in places.items()
    }
    if source.config is not None:
        # Without a quantization block that no tensor bears out, as a container has it.
        data = json.dumps(source.config).encode()
        files[CONFIG_NAME] = ComparedFile(
            partial(_sha256, source.folder, CONFIG_NAME), partial(bytes, data)
        )
    return files


def different_files(a: Mapping[str, ComparedFile], b: Mapping[str, ComparedFile]) -> list[str]:
    """Returns the names of files that say other things on both sides, or are on one side alone.

    JSON files are compared by their values, and but for config.json by the order of their entries,
    others by their bytes. Of config.json the block of a container, the version of transformers and
    the name of the model are left out. Code that one model brings along and the other does not is a
    difference where a file names it (`auto_map`).

    Args:
        a: files by name; documents, such as README.md, are left out.
        b: likewise.

    Raises:
        CodecLLMError: a file is damaged, or no regular file.
        OSError: a file cannot be read.
    """
    names = {name for name in (*a, *b) if _is_read(name)} - _OURS
    has_code = [any(name.endswith(CODE_SUFFIX) for name in files) for files in (a, b)]
    if has_code[0] != has_code[1] and not _name_code([*a.items(), *b.items()]):
        names = {name for name in names if not name.endswith(CODE_SUFFIX)}
    return sorted(
        name for name in names if name not in a or name not in b or _differ(name, a[name], b[name])
    )


def _is_read(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() not in _DOCUMENTS


def _name_code(files: Iterable[tuple[str, ComparedFile]]) -> bool:
    return any(name.endswith(".json") and b'"auto_map"' in file.read() for name, file in files)


def _listed_sha256(container: Container, record: FileRecord) -> str:
    container.check_file(record)
    return record.sha256


def _sha256(*place: Any) -> str:
    with SourceFile(*place) as file:
        return sha256_of_descriptor(file.descriptor)[0]


def _differ(name: str, a: ComparedFile, b: ComparedFile) -> bool:
    if a.sha256() == b.sha256():
        return False
    if not name.endswith(".json"):
        return True
    values = [_value(name, file.read()) for file in (a, b)]
    return None in values or bool(values[0] != values[1])


def _value(name: str, data: bytes) -> Any:
    """Returns what a JSON file says; None where it is no JSON, or more than transformers takes."""
    marks = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if len(data) > VOCABULARY_BYTES or marks > VOCABULARY_VALUES:
        return None
    is_config = PurePosixPath(name).name == CONFIG_NAME
    try:
        # Elsewhere the order of entries may say something: tokens get their ids in it.
        value = json.loads(data, object_pairs_hook=dict if is_config else tuple)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return value
    facts = {key: item for key, item in value.items() if key not in _NO_FACTS}
    block = facts.get(_BLOCK)
    if isinstance(block, dict) and block.get("quant_method") == QUANT_METHOD:
        # Ours stands in the place of the source's, and keeps it.
        facts.pop(_BLOCK)
        if ORIGINAL_KEY in block:
            facts[_BLOCK] = block[ORIGINAL_KEY]
    return facts
