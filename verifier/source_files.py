"""The side files of a container beside those of its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from codecllm.converter.source.files import read_bytes
from codecllm.converter.source.modules import MODULES_NAME
from codecllm.converter.source.source import SourceModel
from codecllm.formats import limits
from codecllm.formats.container import Container
from codecllm.formats.errors import FormatError, ModelMismatchError, shown
from codecllm.formats.manifest.manifest import (
    BASELINE_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    LOAD_REPORT_NAME,
    ORIGINAL_KEY,
)
from codecllm.formats.strict_json import CONFIG_BYTES, parse_config
from codecllm.verifier.report import Stage

NAMES_SHOWN = 8


def check_side_files(container: Container, source: SourceModel, stage: Stage) -> None:
    """Compares the side files with those that a conversion of the source copies, both ways."""
    # These bytes decide on tokens and prompts, which no comparison of tensors sees.
    for name, source_name in source.side_files.copied.items():
        record = container.manifest.file(name)
        if record is None:
            stage.fail(ModelMismatchError("the container lacks this file of the source", file=name))
            continue
        theirs = read_bytes(source.repository, source_name, limits.SIDE_FILE_BYTES)
        same = container.read_side_file(record) == theirs
        if not same and name != MODULES_NAME:  # it names the folders as the container has them
            stage.fail(ModelMismatchError("the file is not the source's", file=name))
    known_names = {CONFIG_NAME, INDEX_NAME, BASELINE_NAME, LOAD_REPORT_NAME}
    for record in container.manifest.files:
        name = record.name
        if name in known_names or name in source.side_files.copied:
            continue
        # An earlier converter may have copied more of the source than this one does.
        if not (source.repository / name).is_file():
            stage.fail(ModelMismatchError("the source lacks this file of the container", file=name))
        elif container.read_side_file(record) != read_bytes(
            source.repository, name, limits.SIDE_FILE_BYTES
        ):
            stage.fail(ModelMismatchError("the file is not the source's", file=name))
    record = container.manifest.file(CONFIG_NAME)
    if record is not None and source.config is not None:
        config = read_bytes(source.folder, CONFIG_NAME, CONFIG_BYTES)
        ours = container.read_side_file(record)
        check_config(ours, config, stage)
        _check_block(ours, source, stage)


def _check_block(data: bytes, source: SourceModel, stage: Stage) -> None:
    """Compares the quantization block that the container keeps of its source."""
    try:
        block = parse_config(data).get("quantization_config")
    except FormatError:  # told already
        return
    kept = block.get(ORIGINAL_KEY) if isinstance(block, dict) else None
    got, expected = (json.dumps(one, sort_keys=True) for one in (kept, source.original_block))
    if got != expected:
        stage.fail(
            ModelMismatchError(
                "the quantization block is not the source's",
                file=CONFIG_NAME,
                got=shown(got)[:80],
                expected=shown(expected)[:80],
            )
        )


def check_config(ours: bytes, theirs: bytes, stage: Stage) -> None:
    """Compares the entries of two config.json, quantization blocks apart.

    Args:
        ours: bytes of the container's.
        theirs: bytes of the source's.
        stage: receives findings.
    """
    try:
        documents = [parse_config(data) for data in (ours, theirs)]
    except FormatError as exc:
        stage.fail(exc)
        return
    for document in documents:
        # The converter replaces the first with its own, and leaves the second out, in every
        # container.
        document.pop("quantization_config", None)
        document.pop("transformers_weights", None)
    for key, part in documents[1].items():
        # So it does with blocks of parts, where it takes the quantization away.
        own = documents[0].get(key)
        for block in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and isinstance(own, dict) and block not in own:
                part.pop(block, None)
    different = different_keys(*documents)
    if different:
        stage.fail(
            ModelMismatchError(
                f"the config differs from the source's: {', '.join(different[:NAMES_SHOWN])}",
                file=CONFIG_NAME,
            )
        )


def different_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns the keys of two JSON objects that one of them lacks or that have other values."""
    # As text: a NaN is unequal to itself.
    a_by_key, b_by_key = (
        {key: json.dumps(value, sort_keys=True, default=repr) for key, value in document.items()}
        for document in (a, b)
    )
    return [key for key in sorted(a.keys() | b.keys()) if a_by_key.get(key) != b_by_key.get(key)]
