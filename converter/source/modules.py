"""Repositories of several modules, as sentence-transformers saves them.

`modules.json` names a folder for each module.

The model that transformers loads stands in the root, or in the folder of the first module
(`0_Transformer/`, `0_CLIPModel/`). In a container it always stands in the root, so `modules.json`
is written with its place changed. Other modules keep their folders, and their weight files are
copied as they are: sentence-transformers reads them itself.
"""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codecllm.converter.source.files import read_json, stays_inside
from codecllm.converter.source.layout import SINGLE_NAME
from codecllm.formats.errors import SourceError, TruncatedError, shown
from codecllm.formats.manifest.manifest import INDEX_NAME
from codecllm.hub.kinds import MOST_MODULES

MODULES_NAME = "modules.json"
ROUTER_NAME = "router_config.json"


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a repository.

    Attributes:
        main: folder of the module that transformers loads, relative to the repository; empty for
            the root.
        others: folders of the other modules.
        document: the content of `modules.json` in the container, or None where the source's own
            stays as it is.
    """

    main: str = ""
    others: frozenset[str] = frozenset()
    document: bytes | None = None


def read_modules(repository: Path) -> Modules:
    """Returns the modules of a repository.

    A repository without `modules.json` has none but the root.

    Raises:
        SourceError: `modules.json` is not a list of modules, has more than 256 of them, or names a
            folder outside the repository, or inside that of the module that becomes the root.
        FormatError: it, or the config of a router, is malformed.
    """
    entries = _read_json(repository, MODULES_NAME)
    if entries is None:
        return Modules()
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SourceError("not a list of modules", file=MODULES_NAME)
    _check_count(len(entries))
    paths = [_module_path(entry) for entry in entries]
    others = {path for path in paths if path}
    for path in paths:
        others |= _routed_folders(repository, path)
        _check_count(len(others))
    main = ""
    # transformers loads the root where it has weights, else the folder of the first module.
    if paths and paths[0] and not _has_weights(repository) and _has_weights(repository / paths[0]):
        main = paths[0]
        others.discard(main)
    document = None
    if main:
        for path in paths:
            if path.startswith(f"{main}/"):
                # Its files move with the folder, perhaps to those of another module.
                raise SourceError(
                    f"a module lies inside the folder of the first one, {shown(main)}",
                    file=MODULES_NAME,
                    got=shown(path),
                )
        root_entries = [
            {**entry, "path": ""} if path == main else entry
            for entry, path in zip(entries, paths, strict=True)
        ]
        document = (json.dumps(root_entries, indent=2, ensure_ascii=False) + "\n").encode()
    return Modules(main, frozenset(others), document)


def _check_count(count: int) -> None:
    """Refuses more modules than any model has: every one is looked for in the folder."""
    if count > MOST_MODULES:
        raise SourceError(
            "too many modules", file=MODULES_NAME, got=count, expected=f"at most {MOST_MODULES}"
        )


def _module_path(entry: dict[str, Any]) -> str:
    path = entry.get("path", "")
    if not isinstance(path, str) or (path and not stays_inside(path)):
        raise SourceError("a module's path is not inside the folder", file=MODULES_NAME)
    path = posixpath.normpath(path.strip("/"))
    return "" if path == "." else path


def _routed_folders(repository: Path, path: str) -> set[str]:
    """Returns the folders of the modules between which a router chooses."""
    prefix = f"{path}/" if path else ""
    config = _read_json(repository, prefix + ROUTER_NAME)
    types = config.get("types") if isinstance(config, dict) else None
    names = [name for name in types if stays_inside(name)] if isinstance(types, dict) else []
    return {prefix + name for name in names}


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def _read_json(repository: Path, name: str) -> Any:
    try:
        return read_json(repository, name)
    except TruncatedError:
        return None
