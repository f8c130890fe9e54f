"""Limits of small files by which transformers would build something far larger.

A line of config.json or tokenizer_config.json can ask for 10^8 labels or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from codecllm.formats import limits
from codecllm.formats.errors import LimitError, UnsafePathError
from codecllm.formats.strict_json import CONFIG_BYTES
from codecllm.loader.config_size import MOST_ITEMS, check_config_size
from codecllm.loader.hf.tokenizer_growth import check_growth
from codecllm.loader.hf.tokenizer_paths import unread_paths

MOST_MADE_TOKENS = 4096
"""Tokens that a tokenizer's class may make by itself; T5 makes 100."""

MOST_SPECIAL_TOKENS = 1 << 15
"""Special tokens of one list: the time that transformers takes grows with their square."""

MOST_TOKEN_ITEMS = 1 << 16
"""Items of any other list or object of a tokenizer's settings."""

VOCABULARY_BYTES, VOCABULARY_VALUES = 256 << 20, 1 << 23
"""Length of tokenizer.json or vocab.json, and commas and opening brackets in it."""

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_INDIRECTIONS = {
    "attribute_map": "other attributes",
    "configuration_files": "other files",
}
"""Entries of config.json by which transformers obeys other entries or files. It writes neither: the
first is an attribute of its classes, the second is of its early versions."""
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER, _VOCABULARY = "tokenizer.json", "vocab.json"
_MADE_TOKENS = ("extra_ids", "num_madeup_words", "offset")
_SPECIAL_TOKENS = ("extra_special_tokens", "additional_special_tokens")


def check_config_file(folder: Path) -> None:
    """Refuses a config.json that asks for more modules or labels than any model has.

    A container's is compared with its tensors too, before its model is built (`config_size.py`).

    Args:
        folder: a model's. A config that is missing or no JSON object is left to transformers.

    Raises:
        ModelMismatchError: it asks for more than 131,072 of them.
        LimitError: a list or an object has more than 131,072 items.
        UnsafePathError: it leads transformers to entries, files or models that are not checked.
    """
    config = _read(folder / "config.json")
    if isinstance(config, dict):
        check_config_document(config)


def check_config_document(config: dict[str, Any]) -> None:
    """As `check_config_file`, of the JSON object of a config.json."""
    for key, length, _ in _sizes(config):
        if key in _INDIRECTIONS and length:
            raise UnsafePathError(
                f"{key} leads transformers to {_INDIRECTIONS[key]} than those that are checked",
                file="config.json",
            )
    for key, name in _backbones(config):
        if _needs_code(config):
            break  # the code decides what the entry means
        raise UnsafePathError(
            f"{key} names a model elsewhere, whose config would decide this one's",
            file="config.json",
            got=ascii(name)[:80],
        )
    try:
        check_config_size(config, MOST_ITEMS, MOST_ITEMS)
    except RecursionError as exc:
        raise LimitError("JSON is nested too deeply", file="config.json") from exc


def refuse_named_kernels(folder: Path, chosen: Mapping[str, Any]) -> None:
    """Refuses a config that names attention or experts of a repository: transformers fetches code.

    Args:
        folder: a model's.
        chosen: arguments of the caller, which replace entries of the config.

    Raises:
        UnsafePathError: there is such an entry, and the caller does not choose another.
    """
    refuse_kernels_of(_read(folder / "config.json"), chosen)


def refuse_kernels_of(config: Any, chosen: Mapping[str, Any]) -> None:
    """As `refuse_named_kernels`, of the JSON value of a config.json."""
    for key, text in _texts(config):
        name = _implementation_in(key)
        if name is not None and "/" in text and chosen.get(name) is None:
            raise UnsafePathError(
                f"{key} names code of a repository (pass {name}= to choose another)",
                file="config.json",
                got=ascii(text)[:80],
            )


def check_tokenizer_files(folder: Path) -> dict[str, None]:
    """Refuses settings of a tokenizer that ask for more tokens than any has, or for other files.

    Args:
        folder: a model's. Files that are missing or no JSON are left to transformers.

    Returns:
        Arguments that keep transformers from paths in the settings; see `unread_paths`.

    Raises:
        UnsafePathError: the settings lead to files that are not checked.
        LimitError: a class would make more than 4,096 tokens by itself, a list or an object has
            more than 65,536 items (of special tokens, or tokens added in tokenizer.json, 32,768),
            or a file is longer, or holds more values, than any of its kind, or tokenizer.json makes
            texts far longer (`tokenizer_growth`).
    """
    _check_added_tokens(folder)
    documents = {file: _read(folder / file) for file in _SETTINGS}
    for file, document in documents.items():
        for key, length, number in _sizes(document):
            most = MOST_SPECIAL_TOKENS if key in _SPECIAL_TOKENS else MOST_TOKEN_ITEMS
            if length > most:
                raise LimitError(
                    f"{key or 'the file'} has too many items",
                    file=file,
                    got=length,
                    expected=f"at most {most}",
                )
            if key in _MADE_TOKENS and number > MOST_MADE_TOKENS:
                raise LimitError(
                    f"{key} asks for too many tokens",
                    file=file,
                    got=str(number)[:40],
                    expected=f"at most {MOST_MADE_TOKENS}",
                )
    return unread_paths(documents["tokenizer_config.json"], documents["special_tokens_map.json"])


def tokenizer_classes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields names of classes, and types of models, by which transformers may choose a tokenizer.

    Args:
        folder: a model's.

    Yields:
        Key and text: of `tokenizer_class`, or of `model_type`.
    """
    for file in ("tokenizer_config.json", "config.json"):
        for key, text in _texts(_read(folder / file)):
            if key in ("tokenizer_class", "model_type"):
                yield key, text


def check_generation_file(folder: Path) -> None:
    """Refuses a generation_config.json that is longer than any, before transformers reads it.

    Raises:
        LimitError: it is longer than 16 MiB, or holds more than 524,288 values.
    """
    _text(folder / "generation_config.json")


def _check_added_tokens(folder: Path) -> None:
    # The vocabulary itself may have any size below the limits of `_read`.
    document = _read(folder / _TOKENIZER)
    if isinstance(document, dict):
        check_growth(document, _TOKENIZER)
    added = document.get("added_tokens") if isinstance(document, dict) else None
    if isinstance(added, list) and len(added) > MOST_SPECIAL_TOKENS:
        raise LimitError(
            "added_tokens has too many items",
            file=_TOKENIZER,
            got=len(added),
            expected=f"at most {MOST_SPECIAL_TOKENS}",
        )
    _text(folder / _VOCABULARY)
    for path in folder.glob("tokenizer.*.json"):  # `fast_tokenizer_files` may name one
        other = _read(path)
        if isinstance(other, dict):
            check_growth(other, path.name)


def _backbones(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields entries by which transformers, or timm, reads the config of another repository.

    A name without a slash and a colon is one of timm's own. In a config of timm's classes a slash
    stands behind a prefix that timm drops.
    """
    stack: list[Any] = [config]
    while stack:
        part = stack.pop()
        if isinstance(part, list):
            stack += part
        elif isinstance(part, dict):
            stack += part.values()
            is_of_timm = part.get("model_type") in ("timm_backbone", "timm_wrapper")
            backbone, architecture = part.get("backbone"), part.get("architecture")
            if isinstance(architecture, str) and is_of_timm and ":" in architecture:
                yield "architecture", architecture
            if not isinstance(backbone, str) or isinstance(part.get("backbone_config"), dict):
                continue
            if ":" in backbone or ("/" in backbone and not is_of_timm):
                yield "backbone", backbone


def _needs_code(config: dict[str, Any]) -> bool:
    """Whether transformers has no class of its own that reads a config."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    return isinstance(kind, str) and kind not in CONFIG_MAPPING


def _sizes(value: Any) -> Iterator[tuple[str, int, float]]:
    """Yields for each value its key, its length and its number; 0 for what it has not."""
    stack = [("", value)]  # without recursion: a file may be nested deeply
    while stack:
        key, part = stack.pop()
        if isinstance(part, (dict, list)):
            yield key, len(part), 0
            stack += part.items() if isinstance(part, dict) else ((key, item) for item in part)
        elif isinstance(part, (int, float)):
            yield key, 0, part


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Yields each string with its key; below an implementation, that key."""
    stack = [("", value)]
    while stack:
        key, part = stack.pop()
        if isinstance(part, dict):
            # An object has an implementation for each part.
            below = _implementation_in(key) is not None
            stack += ((key if below else name, item) for name, item in part.items())
        elif isinstance(part, list):
            stack += ((key, item) for item in part)
        elif isinstance(part, str):
            yield key, part


def _implementation_in(key: str) -> str | None:
    """Returns the implementation that a key is of: transformers has attributes around its name."""
    return next((name for name in _IMPLEMENTATIONS if name in key), None)


def _read(path: Path) -> Any:
    """Returns a file's JSON value; None where there is none. Raises as `_text`."""
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError):
        return None


def _text(path: Path) -> bytes:
    """Returns a file's bytes; none of one that cannot be read.

    Raises:
        LimitError: the file is longer, or holds more values, than any such file: transformers would
            take gigabytes and minutes for it.
    """
    is_vocabulary = path.name in (_TOKENIZER, _VOCABULARY)
    most_bytes = VOCABULARY_BYTES if is_vocabulary else CONFIG_BYTES
    most_values = VOCABULARY_VALUES if is_vocabulary else limits.JSON_VALUES
    try:
        if not path.is_file():
            return b""
        size = path.stat().st_size
        data = path.read_bytes() if size <= most_bytes else b""
    except OSError:
        return b""
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    for what, got, most in (("bytes", size, most_bytes), ("values", values, most_values)):
        if got > most:
            raise LimitError(
                "JSON text is too long", file=path.name, got=got, expected=f"at most {most} {what}"
            )
    return data
