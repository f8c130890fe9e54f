"""Files of a container's folder that the manifest does not list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from codecllm.formats.errors import SchemaError
from codecllm.formats.manifest.manifest import MANIFEST_NAME, Manifest

# The Hub rewrites the last two in a repository, after the manifest was written.
NEVER_LISTED = frozenset({MANIFEST_NAME, "README.md", ".gitattributes"})
_READ_SUFFIXES = frozenset(
    [
        ".bin",
        ".gguf",
        ".jinja",
        ".json",
        ".merges",
        ".model",
        ".npz",
        ".pt",
        ".pth",
        ".py",
        ".safetensors",
        ".spm",
        ".tiktoken",
        ".txt",
        ".vocab",
        ".yaml",
        ".yml",
    ]
)


def unlisted_names(folder: Path, manifest: Manifest) -> list[str]:
    """Returns the names of files and folders in a container's folder that are not part of it.

    Names that begin with a dot are left out. A subfolder without a listed file counts as one.
    """
    listed = {record.name for record in (*manifest.files, *manifest.shards)}
    return sorted(_unlisted(folder, "", listed | NEVER_LISTED))


def is_read_by_a_class(folder: Path, name: str) -> bool:
    """Whether a class of transformers might read an unlisted file, judged by its suffix.

    A folder may hold such files.
    """
    return Path(name).suffix.lower() in _READ_SUFFIXES or (folder / name).is_dir()


def refuse_unlisted(folder: Path, manifest: Manifest) -> None:
    """Refuses what `is_read_by_a_class` in the folder of a container of which every byte is pinned.

    Raises:
        SchemaError: there is such a file; the first one is named.
    """
    for name in unlisted_names(folder, manifest):
        if is_read_by_a_class(folder, name):
            raise unlisted_error(name)


def unlisted_error(name: str) -> SchemaError:
    """Returns the error of an unlisted file beside a pinned manifest."""
    return SchemaError(
        "the pinned manifest does not list this file, and a class of transformers may read it: "
        "move it elsewhere",
        file=name,
    )


def _unlisted(folder: Path, prefix: str, listed: set[str]) -> Iterator[str]:
    for path in folder.iterdir():
        name = prefix + path.name
        if name in listed or path.name.startswith("."):
            continue
        if path.is_dir() and any(one.startswith(f"{name}/") for one in listed):
            yield from _unlisted(path, f"{name}/", listed)
        else:
            yield name
