"""The view of a container that transformers gets: listed files, compared with the manifest.

transformers looks for many files by name in a model's folder (added_tokens.json, chat templates,
other versions of the config, ...). A container's folder may hold such a file that the manifest does
not list: it is not part of the container, and nothing of codecllm reads it (SPEC.md 3).
transformers
therefore gets a temporary folder with copies of the listed files and nothing else.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from codecllm.formats.container import Container
from codecllm.formats.manifest.manifest import CODE_SUFFIX, INDEX_NAME, MANIFEST_NAME

ModelFiles = str | Path | Container
"""A plain model's folder, a container's, or an opened container."""

Choice = Callable[[str], bool]
"""Whether the file of a name is needed."""

_SURROGATES = re.compile("[\ud800-\udfff]")
_MODEL_FILES = frozenset({INDEX_NAME, "config.json", "generation_config.json"})


def for_model(name: str) -> bool:
    """Whether a class of transformers may read this file to build a model, apart from its code."""
    return name in _MODEL_FILES


def for_model_with_code(name: str) -> bool:
    """As `for_model`, and every Python file."""
    return for_model(name) or name.endswith(CODE_SUFFIX)


def for_tokenizer(name: str) -> bool:
    """Whether a tokenizer or processor may read this file: any but code."""
    return not name.endswith(CODE_SUFFIX)


@contextmanager
def listed_files(model: ModelFiles, choice: Choice) -> Iterator[Path]:
    """Yields a folder in which transformers finds the files of a model; it is gone afterwards.

    For a container it is a temporary folder of the same name, `_` in the place of bytes that are
    not UTF-8, with copies of the listed side files that `choice` takes and a link to each shard.
    Each copy has been compared with the manifest. A plain model's folder is yielded as it is.

    Raises:
        FormatError: a file of the container is missing or differs from the manifest.
    """
    if isinstance(model, Container):
        with _copies(model, choice) as folder:
            yield folder
    elif (Path(model) / MANIFEST_NAME).is_file():
        with Container(model) as container, _copies(container, choice) as folder:
            yield folder
    else:
        yield Path(model)


@contextmanager
def _copies(container: Container, choice: Choice) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="codecllm-") as base:
        # transformers names the modules of a model's code after its folder.
        name = container.folder.resolve().name or "container"
        # safetensors opens no path that is not UTF-8; Python has surrogates in the place of bytes.
        folder = Path(base) / _SURROGATES.sub("_", name)
        folder.mkdir()
        for record in container.manifest.files:
            if choice(record.name):
                copy = folder / record.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(container.read_side_file(record))
        for shard in container.manifest.shards:
            (folder / shard.name).symlink_to((container.folder / shard.name).resolve())
        yield folder
