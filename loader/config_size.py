"""Compare the size that a config describes with the container, before a model is built from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from operator import index
from typing import Any

from codecllm.formats.container import Container
from codecllm.formats.errors import LimitError, ModelMismatchError, UsageError

REPEATED = (
    *("layer", "block", "expert", "depth", "stage", "codebook", "level", "merger_times"),
    "pruned_heads",
)
"""Parts of the names of config keys that say how many modules of a kind are built."""

ALWAYS_FINE = 4096
"""Counts up to here are never refused: layers may share their weights."""

ALWAYS_FINE_ELEMENTS = 1 << 28
"""Parameters, or elements of buffers, that are never refused: layers may share them."""

_LARGER = 16

MOST_LABELS = 1 << 20
"""More labels than this are refused, unless the config lists them."""

MOST_ITEMS = 1 << 17
"""Items that one list or object of a config may have."""

_LABELS = ("id2label", "label2id")


def check_config_size(config: dict[str, Any], tensors: int, longest: int = 0) -> None:
    """Refuses a config by which far more modules or labels would be built than there are tensors.

    Args:
        config: the JSON object of config.json.
        tensors: tensors in the container, aliases included.
        longest: the largest dimension of a tensor: a head has a row for each label.

    Raises:
        ModelMismatchError: a count of modules is larger than 4,096 and than the number of tensors,
            or one of labels is larger than 4,096, than `longest`, and than the config's own list.
            It would take minutes and gigabytes to build such a model, to fill none of it.
        LimitError: a list or an object has more than 131,072 items.
    """
    limit = max(ALWAYS_FINE, tensors)
    labels = max(ALWAYS_FINE, min(longest, MOST_LABELS))
    for key, name, value, listed_labels in _counts(config, ""):
        if name == "num_labels" and value > max(labels, listed_labels):
            raise ModelMismatchError(
                f"{key} is more than a tensor has rows, and than id2label has labels",
                file="config.json",
                got=_shown(value),
                expected=f"at most {max(labels, listed_labels)}",
            )
        if _is_count(name) and value > limit:
            raise ModelMismatchError(
                f"{key} describes more modules than the container has tensors",
                file="config.json",
                got=_shown(value),
                expected=f"at most {limit}",
            )


def check_config_of(container: Container, config: dict[str, Any]) -> None:
    """As `check_config_size`, with the tensors of a container."""
    shapes = (getattr(record, "shape", ()) for record in container.records.values())
    longest = max((size for shape in shapes for size in shape), default=0)
    check_config_size(config, len(container.records), longest)


def refuse_larger(model: Any, stored_elements: int) -> None:
    """Refuses a model most of which no tensor can fill, before transformers allocates it.

    Args:
        model: on the meta device.
        stored_elements: of all tensors of the container, or the folder.

    Raises:
        ModelMismatchError: its parameters, or its buffers, have more than 16 times these elements,
            and more than 2^28.
    """
    for kind, values in (("parameters", model.parameters()), ("buffers", model.buffers())):
        elements = sum(value.numel() for value in values)
        if elements > max(_LARGER * stored_elements, ALWAYS_FINE_ELEMENTS):
            raise ModelMismatchError(
                "the config describes a model that is far larger than its weights",
                file="config.json",
                got=f"{kind} of {elements} elements",
                expected=f"about the {stored_elements} elements of the tensors",
            )


def check_config_arguments(
    container: Container, stored: dict[str, Any] | None, arguments: dict[str, Any]
) -> None:
    """As `check_config_of`, of arguments of a caller that replace entries of a config.

    Args:
        container: the container.
        stored: the JSON object of its config.json.
        arguments: by their names; those that are no counts may be anything.

    Raises:
        ModelMismatchError, LimitError: as `check_config_size`.
        UsageError: they are nested too deeply.
    """
    # The number of labels may be that of the names which the config has.
    names = {"id2label": (stored or {}).get("id2label")}
    try:
        check_config_of(container, {**names, **arguments})
    except RecursionError as exc:
        raise UsageError("arguments of this call are nested too deeply") from exc
    except (ModelMismatchError, LimitError) as exc:
        exc.file, exc.message = None, f"an argument asks for too much: {exc.message}"
        raise


def _counts(value: Any, key: str, listed_labels: int = 0) -> Iterator[tuple[str, str, int, int]]:
    """Yields each number and each length: key, its last part, value, labels that stand beside."""
    name = key.rpartition(".")[2].lower()
    if isinstance(value, (dict, list, tuple)):
        if len(value) > MOST_ITEMS:
            raise LimitError(
                f"{key or 'the config'} has too many items",
                file="config.json",
                got=len(value),
                expected=f"at most {MOST_ITEMS}",
            )
        yield key, name, len(value), 0
    if isinstance(value, dict) and name not in _LABELS:  # names of labels are no keys
        names = value.get("id2label")
        listed_labels = len(names) if isinstance(names, dict) else 0
        for inner_name, inner in value.items():
            yield from _counts(inner, f"{key}.{inner_name}" if key else inner_name, listed_labels)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _counts(inner, key)
    elif hasattr(value, "__index__"):  # an argument may be a number of numpy
        with suppress(TypeError):  # a tensor that is no number
            yield key, name, index(value), listed_labels


def _shown(value: int) -> int | str:
    """Returns a number to print; Python refuses the digits of those that are far too long."""
    return value if value.bit_length() < 1000 else f"a number of {value.bit_length()} bits"


def _is_count(name: str) -> bool:
    """Whether a key counts modules: its size, ids and widths are no counts."""
    # `vocab_size` or `expert_dim` may be larger than any number of tensors.
    words = name.split("_")
    if any(word in ("size", "dim", "id", "ids", "index", "token", "tokens") for word in words):
        return False
    return any(part in name for part in REPEATED)
