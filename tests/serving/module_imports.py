"""Which files of the plug-ins import an engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.serving.engine import ROOT


def files_that_import(engine: str) -> list[str]:
    """Returns the names of the files in `serving` that import a module of an engine."""
    paths = sorted((ROOT / "serving").glob("*.py"))
    return [path.name for path in paths if engine in {name.split(".")[0] for name in _names(path)}]


def _names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
