"""Which files of a Hub repository a conversion needs.

First everything but weights, then the weights that these files name.

So a repository that holds a model twice (sharded and whole, other formats, variants) is fetched
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from codecllm.formats.errors import FormatError
from codecllm.formats.strict_json import parse_json
from codecllm.hub.kinds import INDEX_BYTES, MOST_MODULES, uncopied_patterns

Fetch = Callable[[list[str], list[str]], Path]
"""Fetches the files that match one of the first patterns and none of the second ones.

It returns the snapshot's folder.
"""

_SINGLE, _INDEX, _ANY = "model.safetensors", "model.safetensors.index.json", "*.safetensors"
_ROUTER = "router_config.json"


def fetch_source(fetch: Fetch) -> tuple[Path, bool]:
    """Fetches the side files and the weights of a repository.

    Returns the snapshot's folder, and whether it has weights.
    """
    folder = fetch(["*"], [*uncopied_patterns(), _ANY])
    modules = _module_folders(folder)
    main = "" if _has_config(folder) or not modules else modules[0]
    has_weights = any(_fetch_weights(fetch, folder, place) for place in dict.fromkeys(["", main]))
    others = [f"{escape(place)}/*{_ANY[1:]}" for place in modules if place != main]
    if others:
        fetch(others, [])
    return folder, has_weights


def _fetch_weights(fetch: Fetch, folder: Path, place: str) -> bool:
    """Fetches the weights of one folder in transformers' order; returns whether there are some."""
    prefix = f"{place}/" if place else ""
    for names in _candidates(folder / place):
        fetch([escape(prefix + name) for name in names], [])
        if all((folder / prefix / name).is_file() for name in names):
            return True
    fetch([escape(prefix) + _ANY], [f"{escape(prefix)}*/*"])
    return any((folder / prefix).glob(_ANY))


def _candidates(folder: Path) -> Iterator[list[str]]:
    explicit = _entry(_read_json(folder / "config.json"), "transformers_weights")
    if isinstance(explicit, str) and _stays_inside(explicit):
        yield [explicit]
        yield from _indexed(folder / explicit)
    yield [_SINGLE]
    yield from _indexed(folder / _INDEX)


def _indexed(index: Path) -> Iterator[list[str]]:
    weight_map = _entry(_read_json(index), "weight_map")
    if isinstance(weight_map, dict):
        names = {name for name in weight_map.values() if isinstance(name, str)}
        if names and all(_stays_inside(name) for name in names):
            yield sorted(names)


def _module_folders(folder: Path) -> list[str]:
    """Returns the folders of sentence-transformers' modules.

    Those between which a router chooses are among them.
    """
    entries = _read_json(folder / "modules.json")
    entries = entries[:MOST_MODULES] if isinstance(entries, list) else []
    paths = [_entry(entry, "path") for entry in entries]
    places = [path.strip("/") for path in paths if isinstance(path, str) and _stays_inside(path)]
    # modules.json does not name the folders of a router's modules.
    for place in ["", *places]:
        types = _entry(_read_json(folder / place / _ROUTER), "types")
        if isinstance(types, dict):
            prefix = f"{place}/" if place else ""
            names = [name for name in types if _stays_inside(name)][:MOST_MODULES]
            places += [prefix + name for name in names]
        if len(places) > MOST_MODULES:
            break
    return [place for place in places if place]


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _entry(document: Any, key: str) -> Any:
    return document.get(key) if isinstance(document, dict) else None


def _read_json(path: Path) -> Any:
    try:
        if not path.is_file():  # a pipe would make the call wait for ever
            return None
        with open(path, "rb") as file:  # a link into the blobs of the cache
            data = file.read(INDEX_BYTES + 1)
        return parse_json(data, file=path.name, max_bytes=INDEX_BYTES, as_python=True)
    except (OSError, ValueError, FormatError):  # ValueError: a name with a NUL
        return None  # the conversion names the fault


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts
