"""Side files of two models: which of those that transformers reads say other things."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codecllm.converter.source.source import TEXT_ENDINGS, SourceModel
from codecllm.formats.container import Container
from codecllm.formats.manifest.manifest import BASELINE_NAME, CONFIG_NAME, INDEX_NAME
from codecllm.loader.load_report import LOAD_REPORT_NAME

_OURS = frozenset({BASELINE_NAME, LOAD_REPORT_NAME, INDEX_NAME})
_NO_FACTS = ("quantization_config", "transformers_version", "_name_or_path")
"""Entries of config.json that differ between a model and its container, or say who wrote it."""


def files_of_container(container: Container) -> dict[str, Path]:
    """Returns the paths of a container's side files by name."""
    names = [record.name for record in container.manifest.files]
    return {name: container.folder / name for name in names}


def files_of_source(source: SourceModel) -> dict[str, Path]:
    """Returns the paths of a plain model's side files by their names in a container."""
    paths = {name: source.repository / path for name, path in source.side_files.copied.items()}
    if source.config is not None:
        paths[CONFIG_NAME] = source.folder / CONFIG_NAME
    return paths


def different_files(a: Mapping[str, Path], b: Mapping[str, Path]) -> list[str]:
    """Returns the names of files that say other things on both sides, or are on one side alone.

    JSON files are compared by their values, others by their bytes. Of config.json the block of a
    container, the version of transformers and the name of the model are left out.

    Args:
        a: paths by name; files that transformers does not read are left out.
        b: likewise.

    Raises:
        OSError: a file cannot be read.
    """
    names = {name for name in (*a, *b) if name.endswith(TEXT_ENDINGS) and name not in _OURS}
    return sorted(
        name for name in names if name not in a or name not in b or _differ(name, a[name], b[name])
    )


def _differ(name: str, a: Path, b: Path) -> bool:
    contents = [path.read_bytes() for path in (a, b)]
    if contents[0] == contents[1]:
        return False
    if not name.endswith(".json"):
        return True
    try:
        values = [_facts(name, json.loads(data)) for data in contents]
    except (ValueError, RecursionError):
        return True
    return bool(values[0] != values[1])


def _facts(name: str, value: Any) -> Any:
    if Path(name).name != CONFIG_NAME or not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key not in _NO_FACTS}
