"""Figures of the repository and the bars that they have to stay within.

    python -m tools.metrics                       all figures, then a table of folders
    python -m tools.metrics --per-file FOLDER     the files of a folder, with the names to change
    python -m tools.metrics --check               exit code 1 if a figure misses its bar

Only the standard library is used. A file that links make visible twice is counted once.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.code_figures import CodeFigures, measure
from tools.import_graph import ImportGraph
from tools.source_files import (
    PACKAGE_FOLDERS,
    ROOT,
    TEST_FOLDERS,
    TOOL_FOLDERS,
    SourceFile,
    source_files,
    stub_modules,
)
from tools.wrap_markdown import wrap

SIDE_TENSOR_SUFFIXES = frozenset(
    {"_scale", "_col_scale", "_col_group", "_shape", "_chunks", "_tables"}
)
LINE = 100
FILE_LINES = 400
FOLDER_FILES = 14


@dataclass(frozen=True)
class Figure:
    """One figure of the repository, its bar, and where the repository passes it."""

    name: str
    value: float
    bar: float
    at_least: bool = False
    places: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the figure stays within its bar."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def all_figures(root: Path = ROOT) -> list[Figure]:
    """Measures everything: code of the package, all Python files, README and SPEC."""
    package = list(source_files(PACKAGE_FOLDERS, root))
    programs = package + list(source_files(TOOL_FOLDERS, root))
    everything = programs + list(source_files(TEST_FOLDERS, root))
    return [
        *code_figures(package),
        *size_figures(programs, everything),
        *import_figures(package, everything),
        side_tensor_figure(package),
        *document_figures(root),
    ]


def code_figures(files: Iterable[SourceFile]) -> list[Figure]:
    """Figures of words, names and density; the places are the five worst files."""
    per_file = {str(file.path): measure(file, LINE) for file in files}
    total = summed(per_file.values())

    def worst(amounts: dict[str, int]) -> tuple[str, ...]:
        ranking = sorted(amounts.items(), key=lambda item: -item[1])[:5]
        return tuple(f"{path}: {amount}" for path, amount in ranking if amount)

    dialect = worst({path: one.dialect_words for path, one in per_file.items()})
    participles = worst({path: one.participles.total() for path, one in per_file.items()})
    no_docstring = {
        path: one.public_functions - one.documented_functions for path, one in per_file.items()
    }
    return [
        Figure("dialect words per 1,000 docstring words", total.dialect, 2.0, places=dialect),
        Figure(
            "local names that are bare participles, %",
            total.participle_percent,
            2.0,
            places=participles,
        ),
        Figure("syntax nodes a line of code", total.density, 9.0),
        Figure("comment lines, % of lines of code", total.comment_percent, 3.0, at_least=True),
        Figure(
            "public functions with a docstring, %",
            total.documented_percent,
            97.0,
            at_least=True,
            places=worst(no_docstring),
        ),
    ]


def size_figures(programs: list[SourceFile], everything: list[SourceFile]) -> list[Figure]:
    """Figures of lines, files and folders."""
    too_wide = [
        f"{file.path}:{number}"
        for file in everything
        for number, line in enumerate(file.lines, 1)
        if len(line) > LINE
    ]
    too_long = [
        f"{file.path}: {len(file.lines)}" for file in programs if len(file.lines) > FILE_LINES
    ]
    folders: dict[str, int] = defaultdict(int)
    for file in programs:
        folders[file.folder] += file.path.name != "__init__.py"
    too_full = [f"{name}: {count}" for name, count in folders.items() if count > FOLDER_FILES]
    return [
        Figure(f"lines longer than {LINE}", len(too_wide), 0, places=_per_file(too_wide)),
        Figure(f"files over {FILE_LINES} lines", len(too_long), 0, places=tuple(too_long)),
        Figure(
            f"folders with more than {FOLDER_FILES} files", len(too_full), 0, False, tuple(too_full)
        ),
    ]


def import_figures(package: list[SourceFile], everything: list[SourceFile]) -> list[Figure]:
    """Figures of imports: circles within the package, imports that resolve nowhere."""
    stubs = stub_modules(PACKAGE_FOLDERS)
    circles = [" <-> ".join(circle) for circle in ImportGraph(package, stubs).circles()]
    unresolved_imports = ImportGraph(everything, stubs).unresolved
    return [
        Figure("import circles, lazy and typing ones too", len(circles), 0, False, tuple(circles)),
        Figure(
            "imports of ours that do not resolve",
            len(unresolved_imports),
            0,
            False,
            tuple(unresolved_imports),
        ),
    ]


def side_tensor_figure(package: list[SourceFile]) -> Figure:
    """Counts the modules that spell a side tensor's suffix in a string of its own."""
    modules = [
        str(file.path)
        for file in package
        if any(
            isinstance(node, ast.Constant) and node.value in SIDE_TENSOR_SUFFIXES
            for node in ast.walk(file.tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
    ]
    return Figure("modules that spell side tensors", len(modules), 1, places=tuple(modules))


def document_figures(root: Path) -> list[Figure]:
    """Figures of README.md and SPEC.md."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    spec = (root / "SPEC.md").read_text(encoding="utf-8")
    lines = enumerate(readme.splitlines(), 1)
    install = next((number for number, line in lines if "pip install" in line), 10**6)
    differing = wrapping_faults(spec)
    return [
        Figure("words of README.md", len(readme.split()), 1500),
        Figure("line of `pip install` in README.md", install, 29),
        Figure("lines of SPEC.md not wrapped at 100", len(differing), 0, False, differing[:5]),
    ]


def wrapping_faults(text: str) -> tuple[str, ...]:
    """Returns the lines of a Markdown text that `tools.wrap_markdown` would change."""
    wrapped_lines = set(wrap(text).splitlines())
    lines = enumerate(text.splitlines(), 1)
    return tuple(f"line {number}: {line}" for number, line in lines if line not in wrapped_lines)


def summed(figures: Iterable[CodeFigures]) -> CodeFigures:
    """Adds up the figures of several files."""
    total = CodeFigures()
    for one in figures:
        total.add(one)
    return total


def _per_file(places: Iterable[str]) -> tuple[str, ...]:
    """Turns `path:line` places into the five files with most of them."""
    counts: dict[str, int] = defaultdict(int)
    for place in places:
        counts[place.rsplit(":", 1)[0]] += 1
    ranking = sorted(counts.items(), key=lambda item: -item[1])[:5]
    return tuple(f"{path}: {count}" for path, count in ranking)


_COLUMNS = "  files   lines  dialect  participles  nodes/line  comments  docstrings  longest  long"


def _row(name: str, one: CodeFigures) -> str:
    return (
        f"{name:42}{one.files:7}{one.lines:8}{one.dialect:9.1f}{one.participle_percent:12.1f}%"
        f"{one.density:12.1f}{one.comment_percent:9.1f}%{one.documented_percent:11.0f}%"
        f"{one.longest_line:9}{one.long_lines:6}"
    )


def _print_folders() -> None:
    folders: dict[str, list[CodeFigures]] = defaultdict(list)
    for file in source_files(PACKAGE_FOLDERS + TOOL_FOLDERS + TEST_FOLDERS):
        top = file.path.parts[0]
        folders[top if top in TEST_FOLDERS else file.folder].append(measure(file, LINE))
    print(f"\n{'folder':42}{_COLUMNS}")
    for name, figures in sorted(folders.items()):
        print(_row(name, summed(figures)))


def _print_files(folder: str) -> None:
    """Prints the files at and below a folder, and below each the participles it uses as names."""
    wanted_path = Path(folder.removeprefix("codecllm.").replace(".", "/"))
    print(f"{'file':42}{_COLUMNS}")
    for file in source_files(PACKAGE_FOLDERS + TOOL_FOLDERS + TEST_FOLDERS):
        if wanted_path == file.path or wanted_path in file.path.parents:
            one = measure(file, LINE)
            print(_row(str(file.path), one))
            names = ", ".join(f"{name} {n}" for name, n in one.participles.most_common())
            if names:
                print(f"    participles: {names}")


def _print_figures(figures: list[Figure]) -> None:
    print(f"{'figure':46}{'value':>9}  bar")
    for figure in figures:
        sign = ">=" if figure.at_least else "<="
        verdict = "" if figure.kept else "   MISSED"
        print(f"{figure.name:46}{round(figure.value, 2):9,}  {sign} {figure.bar:,g}{verdict}")
        if not figure.kept:
            for place in figure.places:
                print(f"    {place}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.metrics",
        description="Figures of words, density, files, imports and documents, with their bars.",
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--per-file", metavar="FOLDER", help="figures of a folder's files")
    options = parser.parse_args(arguments)
    if options.per_file:
        _print_files(options.per_file)
        return 0
    figures = all_figures()
    if options.json:
        print(json.dumps([asdict(figure) | {"kept": figure.kept} for figure in figures], indent=1))
    else:
        _print_figures(figures)
        _print_folders()
    missed_names = [figure.name for figure in figures if not figure.kept]
    if options.check and missed_names:
        print(f"\nmissed: {'; '.join(missed_names)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
