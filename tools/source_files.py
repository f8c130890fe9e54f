"""The project's own Python files, each parsed once and listed once, for any number of links."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FOLDERS = (
    "calibrator",
    "codecllm",
    "converter",
    "formats",
    "hub",
    "loader",
    "serving",
    "verifier",
)
"""Folders that are installed. Those beside `codecllm` are seen by Python as its sub-packages."""
TOOL_FOLDERS = ("benchmarks", "demo", "tools")
"""Folders with programs of the repository that are not installed."""
TEST_FOLDERS = ("tests",)


@dataclass(frozen=True)
class SourceFile:
    """One Python file: its path below the repository, its text and its syntax tree."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of the file."""
        return ast.parse(self.text, filename=str(self.path))

    @property
    def lines(self) -> list[str]:
        """The lines of the file without their line ends."""
        return self.text.splitlines()

    @property
    def folder(self) -> str:
        """The folder of the file, relative to the repository."""
        return self.path.parent.as_posix()

    @property
    def module(self) -> str:
        """The dotted name under which Python imports the file."""
        parts = list(self.path.with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts[0] in PACKAGE_FOLDERS and parts[0] != "codecllm":
            parts.insert(0, "codecllm")
        return ".".join(parts)


def source_files(folders: tuple[str, ...], root: Path = ROOT) -> Iterator[SourceFile]:
    """Yields the Python files below `folders`, sorted by path; symbolic links are not followed."""
    yield from _files_ending(".py", folders, root)


def stub_modules(folders: tuple[str, ...], root: Path = ROOT) -> set[str]:
    """Returns the dotted names of compiled modules, which have a stub file (`.pyi`)."""
    return {file.module for file in _files_ending(".pyi", folders, root)}


def _files_ending(suffix: str, folders: tuple[str, ...], root: Path) -> Iterator[SourceFile]:
    paths: list[Path] = []
    for folder in folders:
        for directory, _, names in os.walk(root / folder):
            paths += [Path(directory, name) for name in names if name.endswith(suffix)]
    for path in sorted(paths):
        if not path.is_symlink():
            yield SourceFile(path.relative_to(root), path.read_text(encoding="utf-8"))
