"""Compare the size that a config describes with the container, before a model is built from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from codecllm.formats.errors import ModelMismatchError

REPEATED = ("layer", "block", "expert", "depth", "stage", "codebook", "level")
"""Parts of the names of config keys that say how many modules of a kind are built."""

ALWAYS_FINE = 4096
"""Counts up to here are never refused: layers may share their weights."""


def check_config_size(config: dict[str, Any], tensors: int) -> None:
    """Refuses a config by which far more modules would be built than there are tensors.

    Args:
        config: the JSON object of config.json.
        tensors: tensors in the container, aliases included.

    Raises:
        ModelMismatchError: a count is larger than 4,096 and than the number of tensors. It would
            take minutes and gigabytes to build such a model, to fill none of it.
    """
    limit = max(ALWAYS_FINE, tensors)
    for key, value in _counts(config, ""):
        if value > limit:
            raise ModelMismatchError(
                f"{key} describes more modules than the container has tensors",
                file="config.json",
                got=value,
                expected=f"at most {limit}",
            )


def _counts(value: Any, key: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _counts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _counts(inner, key)
    elif isinstance(value, int) and _is_count(key.rpartition(".")[2].lower()):
        yield key, value


def _is_count(name: str) -> bool:
    """Whether a key counts modules: its size, ids and widths are no counts."""
    # `vocab_size` or `expert_dim` may be larger than any number of tensors.
    words = name.split("_")
    if any(word in ("size", "dim", "id", "ids", "index", "token", "tokens") for word in words):
        return False
    return any(part in name for part in REPEATED)
