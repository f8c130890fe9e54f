"""Wraps the prose of a Markdown file: `python -m tools.wrap_markdown SPEC.md`.

Tables, code, headings, quotations, directives and HTML keep their lines; paragraphs and list items
are filled up to 100 characters.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

WIDTH = 100
_FENCE = re.compile(r"\s*(```|~~~)")
_ITEM = re.compile(r"(\s*)([-*+]|\d+\.)\s+")
_SIGN = re.compile(r" (?=(?:[-*+#>|]+|\d+\.)(?: |$))")
_KEPT = re.compile(r"\s*(\||#|<|>|:::|!\[|\{%|--8<--|\[[^\]]+\]:)| {4,}\S")


def wrap(text: str, width: int = WIDTH) -> str:
    r"""Returns Markdown text with its paragraphs filled up to `width` characters.

    Examples:
        >>> wrap("Two\nlines.\n\n| a | table |\n")
        'Two lines.\n\n| a | table |\n'
    """
    result: list[str] = []
    paragraph: list[str] = []
    in_fence = False
    for line in text.splitlines():
        if _FENCE.match(line):
            in_fence = not in_fence
            result += _fill(paragraph, width)
            result.append(line)
        elif in_fence:
            result.append(line)
        elif _is_text(line, paragraph):
            if _ITEM.match(line):
                result += _fill(paragraph, width)
            paragraph.append(line)
        else:
            result += _fill(paragraph, width)
            result.append(line)
    result += _fill(paragraph, width)
    return "\n".join(result) + "\n" if result else ""


def _is_text(line: str, paragraph: list[str]) -> bool:
    """Tells whether a line belongs to a paragraph; an indented one does within a list item."""
    if not line.strip():
        return False
    if paragraph and line.startswith(" ") and _ITEM.match(paragraph[0]):
        return not _KEPT.match(line.strip())
    return not _KEPT.match(line)


def _fill(paragraph: list[str], width: int) -> list[str]:
    """Empties the collected lines of a paragraph and returns them filled."""
    if not paragraph:
        return []
    item = _ITEM.match(paragraph[0])
    # A paragraph with an indent goes on the list item before it.
    first = item.group(1) if item else " " * (len(paragraph[0]) - len(paragraph[0].lstrip()))
    later = " " * len(item.group(0)) if item else first
    words = " ".join(line.strip() for line in paragraph)
    # A line must not begin with a sign that Markdown reads as a list, a heading or a table.
    start = len(item.group(0).lstrip()) if item else 0
    words = words[:start] + _SIGN.sub("\0", words[start:])
    paragraph.clear()
    new_lines = textwrap.wrap(
        words,
        width,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in new_lines]


def main() -> None:
    """Wraps the files named on the command line in place."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(wrap(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
