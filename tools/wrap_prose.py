"""Wraps the prose of Markdown files at 100 columns: paragraphs and list items; tables, code and headings stay.

`python -m tools.wrap_prose FILE...`
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

WIDTH = 100
_ITEM = re.compile(r"^(\s*)([-*]|\d+\.)(\s+)")
_VERBATIM = re.compile(r"^\s*(#|\||<!--|!\[|:::|>|\{%)|^(    |\t)(?!\s*([-*]|\d+\.)\s)")


def wrap(text: str) -> str:
    """Returns the text with every paragraph and list item wrapped."""
    output: list[str] = []
    block: list[str] = []
    fenced = False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            _flush(block, output)
            output.append(line)
        elif fenced or not line.strip() or _is_verbatim(line, block):
            _flush(block, output)
            output.append(line)
        else:
            if _ITEM.match(line):
                _flush(block, output)
            block.append(line)
    _flush(block, output)
    return "\n".join(output)


def _is_verbatim(line: str, block: list[str]) -> bool:
    inside_item = bool(block) and line.startswith(" ")
    return bool(_VERBATIM.match(line)) and not inside_item


def _flush(block: list[str], output: list[str]) -> None:
    """Appends the wrapped block to the output and empties it."""
    if not block:
        return
    item = _ITEM.match(block[0])
    first = item.group(0) if item else re.match(r"\s*", block[0]).group(0)  # type: ignore[union-attr]
    words = " ".join([block[0][len(first) :], *(line.strip() for line in block[1:])])
    output += textwrap.wrap(
        words, WIDTH, initial_indent=first, subsequent_indent=" " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    block.clear()


def main() -> None:
    """Wraps the files that the command line names, in place."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(wrap(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
