"""What a disk may hold after a power cut, by the log of operations that shim.c writes.

Every change of a file and of a folder may survive or be lost, alone, until an fsync of that file or
folder has ended. Of two changes of one name or one range of bytes the later one wins. A rename is
one change, of two folders: the new name is there and the old one gone, or neither.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
"""Name -> bytes of a file, or the tree of a folder."""


@dataclass(eq=False)
class Change:
    """A change of a file (bytes at an offset, or a new size) or of a folder (a name).

    Attributes:
        content: bytes, a size, or the name's file or folder, None where the name is removed.
        place: an offset, or a name.
        other: the new name, where this is the removal of the old one by a rename, or its removal.
        is_durable: an fsync has forced it to the disk.
    """

    content: Any
    place: Any = None
    other: Change | None = None
    is_durable: bool = False


@dataclass(eq=False)
class Node:
    """A file, or a folder where `names` is not None, with all its changes since the beginning.

    Attributes:
        names: what the running process finds in the folder.
        changes: in order.
        begun: number of changes before the fsync that is running.
    """

    names: dict[str, Node] | None = None
    changes: list[Change] = field(default_factory=list)
    begun: int = 0


Survives = Callable[[Node], float]
"""Which part of a change of a node survives, 0 to 1; a part of a write is its first bytes."""


class Disk:
    """The files below a folder, as processes see them and as a power cut may leave them."""

    def __init__(self, root: Path, tree: Tree) -> None:
        """Begins with `tree` in the folder `root`, all of it on the disk."""
        self._root = root
        self._top = _durable(tree)

    def apply(self, operation: str, path: str, second: str, numbers: tuple[int, int], data: bytes):
        """Does one operation of the log."""
        folder, name = self._find(path)
        node = folder.names.get(name) if name else folder
        if operation == "write":
            node.changes.append(Change(data, numbers[0]))
        elif operation == "truncate":
            node.changes.append(Change(numbers[0]))
        elif operation == "fsync":
            node.begun = len(node.changes)
        elif operation == "synced":
            for change in node.changes[: node.begun]:
                change.is_durable = True
                if change.other is not None:
                    change.other.is_durable = True
        elif operation == "create" and node is not None:
            node.changes += [Change(0)] * numbers[1]
        elif operation in ("create", "mkdir"):
            _set(folder, name, Node({} if operation == "mkdir" else None))
        elif operation == "rename":
            target, new_name = self._find(second)
            added = _set(target, new_name, node)
            added.other = _set(folder, name, None, added)
        elif operation in ("unlink", "rmdir"):
            _set(folder, name, None)
        else:
            raise ValueError(operation)

    def surviving(self, survives: Survives) -> Tree:
        """Returns what is on the disk where of the changes without fsync those survive."""
        return _surviving(self._top, survives, {})

    def _find(self, path: str) -> tuple[Node, str]:
        """Returns the folder of a path and the name in it; the top folder has an empty name."""
        parts = Path(path).relative_to(self._root).parts
        folder = self._top
        for part in parts[:-1]:
            folder = folder.names[part]
        return folder, parts[-1] if parts else ""


def read_log(log: Path) -> Iterator[tuple[str, str, str, tuple[int, int], bytes]]:
    """Yields the operations of a log as arguments of `Disk.apply`."""
    data = log.read_bytes()
    at = 0
    while at < len(data):
        line, _, _ = data[at:].partition(b"\n")
        at += len(line) + 1
        operation, path, second, *rest = line.decode().split("\t")
        numbers = int(rest[0]), int(rest[1])
        length = numbers[1] if operation == "write" else 0
        yield operation, path, second, numbers, data[at : at + length]
        at += length


def ways(count: int, seed: int) -> dict[str, Survives]:
    """Returns the extreme ways to lose changes, and `count` random ones."""
    result: dict[str, Survives] = {
        "nothing": lambda node: 0,
        "names without data": lambda node: node.names is not None,
        "data without names": lambda node: node.names is None,
        "everything": lambda node: 1,
    }
    for number in range(count):
        dice = random.Random(f"{seed} {number}")
        kept = dice.choice([0.2, 0.5, 0.8])
        result[f"random {number}"] = lambda node, dice=dice, kept=kept: (
            dice.choice([1, 1, 0.5]) if dice.random() < kept else 0
        )
    return result


def read_tree(folder: Path) -> Tree:
    """Returns the tree of a folder."""
    return {
        path.name: read_tree(path) if path.is_dir() else path.read_bytes()
        for path in folder.iterdir()
    }


def write_tree(tree: Tree, folder: Path) -> None:
    """Writes a tree into an empty folder."""
    for name, content in tree.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).mkdir()
            write_tree(content, folder / name)


def flat(tree: Tree, base: str = "") -> dict[str, bytes]:
    """Returns the files of a tree and its subfolders by their relative paths."""
    files: dict[str, bytes] = {}
    for name, content in tree.items():
        inner = {"": content} if isinstance(content, bytes) else flat(content, "/")
        files |= {base + name + rest: data for rest, data in inner.items()}
    return files


def _set(folder: Node, name: str, node: Node | None, other: Change | None = None) -> Change:
    change = Change(node, name, other)
    folder.changes.append(change)
    if node is None:
        del folder.names[name]
    else:
        folder.names[name] = node
    return change


def _surviving(node: Node, survives: Survives, parts: dict[Change, float]) -> Any:
    """Returns the tree or the bytes of a node; `parts` remembers what was decided of a change."""
    found = [(change, _part(node, change, survives, parts)) for change in node.changes]
    if node.names is None:
        data = bytearray()
        for change, part in found:
            _write(data, change, part)
        return bytes(data)
    entries: dict[str, Node] = {}
    for change, part in found:
        if part > 0:
            entries.pop(change.place, None)
            if change.content is not None:
                entries[change.place] = change.content
    return {name: _surviving(inner, survives, parts) for name, inner in entries.items()}


def _part(node: Node, change: Change, survives: Survives, parts: dict[Change, float]) -> float:
    if change.is_durable:
        return 1
    if change not in parts:
        parts[change] = survives(node)
        if change.other is not None:
            parts[change.other] = parts[change]
    return parts[change]


def _write(data: bytearray, change: Change, part: float) -> None:
    if isinstance(change.content, int):
        if part > 0:
            data[change.content :] = bytes(max(0, change.content - len(data)))
        return
    written = change.content[: int(len(change.content) * part)]
    if written:
        data.extend(bytes(max(0, change.place - len(data))))
        data[change.place : change.place + len(written)] = written


def _durable(content: bytes | Tree) -> Node:
    if isinstance(content, bytes):
        return Node(None, [Change(content, 0, is_durable=True)])
    names = {name: _durable(inner) for name, inner in content.items()}
    return Node(names, [Change(node, name, is_durable=True) for name, node in names.items()])
