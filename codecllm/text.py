"""Text from strangers, escaped for where it goes: names, versions and answers may hold anything."""

from __future__ import annotations

import re
import unicodedata

# Unicode categories that a terminal obeys, hides or reorders by: controls, formats, surrogates,
# separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~&])")


def visible(text: str) -> str:
    r"""Returns text in which nothing acts on a terminal: hidden characters stand as escapes.

    Line feeds and tabs stay.

    Examples:
        >>> visible("a\x1b[31mb\u202e")
        'a\\x1b[31mb\\u202e'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in _HIDDEN
        else char.encode("unicode_escape").decode()
        for char in text
    )


def in_markdown(text: str) -> str:
    r"""Returns text for one place of a Markdown document.

    It makes no link, tag, table cell or line of its own.

    Examples:
        >>> in_markdown("1.0 | <b>")
        '1.0 \\| \\<b\\>'
    """
    return _MARKDOWN.sub(r"\\\1", " ".join(visible(text).split()))
