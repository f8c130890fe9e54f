"""Paths in the settings of a tokenizer, which could lead transformers out of the model's folder.

transformers hands every entry of tokenizer_config.json, and of special_tokens_map.json, to the
tokenizer's class. Some classes open what a string among them names: a vocabulary of another folder,
a pipe, a device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from codecllm.formats.errors import UnsafePathError, shown

# Objects or lists where they are well-formed: the vocabulary itself, and arguments by position.
_NEVER_TEXT = ("entity_vocab", "init_inputs", "merges", "tokenizer_object", "vocab")
_FILE = re.compile(r"(?!name_or_path).*_(file|path|dir|proto|spm)", re.DOTALL)
# The files among which transformers chooses by its version; `side_limits` reads them all.
_VERSIONED = re.compile(r"tokenizer\.([^/\\]+\.)?json")


def unread_paths(settings: Any, tokens_map: Any) -> dict[str, None]:
    """Refuses entries that only name files, and finds those that old files have without need.

    Many published settings say where their files lay when they were written (`vocab_file`, ...).

    Args:
        settings: JSON value of tokenizer_config.json, None where there is none.
        tokens_map: that of special_tokens_map.json.

    Returns:
        Arguments for `AutoTokenizer.from_pretrained` that stand above such entries of the settings:
        transformers looks for these files by their own names in the model's folder.

    Raises:
        UnsafePathError: an entry can only name a file, or one that lies elsewhere.
    """
    for file, document in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", tokens_map),
    ):
        for key, value in _refused(document):
            raise UnsafePathError(
                f"{key} would lead transformers to a file that is not checked",
                file=file,
                got=shown(value),
            )
    for key, value in _entries(tokens_map):
        if _FILE.fullmatch(key) and isinstance(value, str):
            raise UnsafePathError(
                f"{key} is no special token", file="special_tokens_map.json", got=shown(value)
            )
    return {
        key: None
        for key, value in _entries(settings)
        if _FILE.fullmatch(key) and isinstance(value, str)
    }


def _refused(document: Any) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a file that are refused whatever they say."""
    for key, value in _entries(document):
        if key in _NEVER_TEXT and value and (isinstance(value, str) or key == "init_inputs"):
            yield key, value
        elif key == "fast_tokenizer_files":
            for name in value if isinstance(value, list) else [value]:
                if not isinstance(name, str) or not _VERSIONED.fullmatch(name):
                    yield key, name
        elif key.endswith("_kwargs"):
            # Arguments of another library, such as SentencePiece's `model_file`.
            for below, text in _entries(value):
                if isinstance(text, str) and (_FILE.fullmatch(below) or "/" in text):
                    yield f"{key}.{below}", text


def _entries(document: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(document, Mapping):
        yield from document.items()
