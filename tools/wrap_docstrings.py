"""Wraps docstrings and comments of Python files: `python -m tools.wrap_docstrings FILE...`.

Paragraphs and entries of `Args:` and the like with a line of more than 100 characters are filled
again. A summary line that is too long is printed instead: it needs other words. Code and strings
are not touched; the program of a changed file is compared with that of the old one.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

WIDTH = 100
_SECTION = re.compile(r"\s*(Args|Attributes|Raises|Returns|Yields|Example|Examples|Note):$")
_ENTRIES = re.compile(r"\s*(Args|Attributes|Raises):$")
_SIGN = re.compile(r" (?=[-*+] )")
_KEPT = re.compile(r"\s*(\||>>>|\.\.\.|[-*] |\d+\. )")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def wrap_source(text: str) -> tuple[str, list[int]]:
    """Wraps the docstrings and block comments of a Python file.

    Returns:
        The new text, and the numbers of its lines that are still too long.
    """
    lines = text.splitlines()
    for first, last in sorted(_docstring_lines(text), reverse=True):
        lines[first:last] = _wrap_docstring(lines[first:last])
    lines = _wrap_comments(lines)
    new_text = "\n".join(lines) + "\n" if lines else ""
    if _without_docstrings(text) != _without_docstrings(new_text):
        raise AssertionError("wrapping changed the program")
    return new_text, [number for number, line in enumerate(lines, 1) if len(line) > WIDTH]


def _docstring_lines(text: str) -> Iterator[tuple[int, int]]:
    """Yields the range of lines, counted from 0, of each docstring and string below a name."""
    for node in ast.walk(ast.parse(text)):
        for statement in getattr(node, "body", []) if isinstance(node, _Documented) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.lineno - 1, statement.end_lineno or statement.lineno


def _wrap_docstring(lines: list[str]) -> list[str]:
    """Wraps all but the summary line, block by block."""
    if len(lines) == 1:
        return lines
    indent = len(lines[0]) - len(lines[0].lstrip())
    result: list[str] = []
    block: list[str] = []
    literal = False
    for number, line in enumerate(lines):
        section = _section(result)
        begins_literal = _indent(line) > indent + 3 and not block and not section
        literal = bool(line.strip()) and (literal or begins_literal)
        closes = line.strip() == '"""'
        if number == 0 or not line.strip() or closes or literal or _KEPT.match(line):
            result += _fill(block, section)
            result.append(line)
        elif _SECTION.match(line):
            result += _fill(block)
            result.append(line)
        else:
            if block and _ENTRIES.match(section) and _indent(line) <= _indent(block[0]):
                result += _fill(block, section)
            block.append(line)
    return result + _fill(block, _section(result))


def _section(before: list[str]) -> str:
    """Returns the line `Args:` or the like that began the paragraph which goes on here, or ""."""
    for line in reversed(before):
        if not line.strip():
            return ""
        if _SECTION.match(line):
            return line
    return ""


def _fill(block: list[str], section: str = "") -> list[str]:
    """Empties the block and returns its lines, filled again if one of them is too long."""
    lines = list(block)
    block.clear()
    if not lines or max(map(len, lines)) <= WIDTH:
        return lines
    first = " " * _indent(lines[0])
    later = first + " " * 4 if _ENTRIES.match(section) else first
    if len(lines) > 1:
        later = " " * _indent(lines[1])
    # No line begins with an operator: it would read as the entry of a list.
    words = _SIGN.sub("\0", " ".join(line.strip() for line in lines))
    end = '"""' if words.endswith('"""') else ""
    new_lines = textwrap.wrap(
        words.removesuffix(end) if end else words,
        WIDTH - len(end),
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    new_lines[-1] += end
    return [line.replace("\0", " ") for line in new_lines]


def _wrap_comments(lines: list[str]) -> list[str]:
    """Wraps runs of lines that hold only a comment."""
    result: list[str] = []
    run: list[str] = []
    for line in [*lines, ""]:
        if line.lstrip().startswith("# ") and (not run or _indent(run[0]) == _indent(line)):
            run.append(line)
            continue
        result += _fill_comment(run)
        run = [line] if line.lstrip().startswith("# ") else []
        result += [] if run else [line]
    return result[:-1]


def _fill_comment(run: list[str]) -> list[str]:
    if not run or max(map(len, run)) <= WIDTH:
        return run
    lead = " " * _indent(run[0]) + "# "
    words = " ".join(line.lstrip().removeprefix("# ") for line in run)
    return textwrap.wrap(words, WIDTH, initial_indent=lead, subsequent_indent=lead)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _without_docstrings(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, _Documented):
            node.body = [
                part
                for part in node.body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return ast.dump(tree)


def main() -> None:
    """Wraps the files named on the command line in place and prints lines that stay too long."""
    for name in sys.argv[1:]:
        path = Path(name)
        text, too_long = wrap_source(path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
        for number in too_long:
            print(f"{name}:{number}: {text.splitlines()[number - 1].strip()}")


if __name__ == "__main__":
    main()
