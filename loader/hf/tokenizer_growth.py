"""How much longer a tokenizer.json can make a text, from the JSON alone.

A chain of six replacements of a letter by twenty makes 64 million characters of each. tokenizers
has no bound of its own, so the worst case is computed here before it reads the file.
"""

from __future__ import annotations

import base64
import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from codecllm.formats.errors import LimitError

MOST_GROWTH = 64
"""How many times as long a normalizer or decoder may make a text.

The maps of SentencePiece come to 18: one Arabic ligature stands for so many characters.
"""

MOST_COPIES = 2
"""How often a post-processor may repeat a text."""

MOST_ADDED = 4096
"""Characters or tokens that are added to a text, whatever its length."""

MOST_STEPS = 1024
"""Steps of a normalizer, post-processor or decoder."""

_MAP_CHARACTERS = 1 << 20  # of base64; the map of most models of SentencePiece has 320,012

# Patterns of which each match has a character or more. Any other may match at every place.
_NEVER_EMPTY = re.compile(
    r"(?:[^\\()|?*{}^$]|\\[sdwSDWntr]|\{[1-9][0-9]*(?:,(?:[1-9][0-9]*)?)?\})+"
)
# Factors in characters after compatibility decomposition, in which Unicode's own forms grow none.
_FACTORS = {"ByteLevel": 12.0, "BertNormalizer": 3.0}
_LISTS = ("normalizers", "processors", "decoders")


def check_growth(document: dict[str, Any], file: str) -> None:
    """Refuses a tokenizer that can make texts, or tokens, far longer than they are.

    Args:
        document: the JSON object of tokenizer.json. Entries of a wrong type are left to tokenizers.
        file: its name.

    Raises:
        LimitError: the replacements of its normalizer or decoder make a text more than 64 times as
            long, its post-processor repeats a text more than twice, or one of them adds more than
            4,096 characters or tokens or has more than 1,024 steps.
    """
    for part, most, growth_of in (
        ("normalizer", MOST_GROWTH, growth_of_text),
        ("decoder", MOST_GROWTH, growth_of_text),
        ("post_processor", MOST_COPIES, _growth_of_tokens),
    ):
        factor, added = 1.0, 0.0
        for number, step in enumerate(_steps(document.get(part))):
            if number > MOST_STEPS:
                raise LimitError(
                    f"{part} has too many steps", file=file, expected=f"at most {MOST_STEPS}"
                )
            times, more = growth_of(step)
            factor, added = factor * times, added * times + more
            # Here and not behind the loop: products of a long chain overflow.
            if factor > most or added > MOST_ADDED:
                raise LimitError(
                    f"{part} can make a text far longer",
                    file=file,
                    got=f"{factor:.3g} times and {added:.3g} more",
                    expected=f"at most {most} times and {MOST_ADDED} more",
                )


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """Yields the steps of a sequence of sequences, in order."""
    stack = [value]  # without recursion: a file may be nested deeply
    while stack:
        step = stack.pop()
        if not isinstance(step, dict):
            continue
        yield step
        for name in _LISTS:
            steps = step.get(name)
            if isinstance(steps, list):
                stack += reversed(steps)


def growth_of_text(step: dict[str, Any]) -> tuple[float, float]:
    """Returns by what factor a step makes a text longer, and how many characters it adds.

    Args:
        step: the JSON object of one step of a normalizer or decoder.

    Returns:
        Both of the worst text. Lengths are those after compatibility decomposition (NFKD).
    """
    kind = step.get("type")
    if kind == "Prepend":
        return 1.0, _length(step.get("prepend"))
    if kind == "Precompiled":
        return _longest_of_map(step.get("precompiled_charsmap")), 0.0
    if kind != "Replace":
        return _FACTORS.get(str(kind), 1.0), 0.0
    pattern, content = step.get("pattern"), _length(step.get("content"))
    if isinstance(pattern, dict):
        text, regex = pattern.get("String"), pattern.get("Regex")
        if isinstance(text, str) and text:
            return max(1.0, content / _length(text)), 0.0
        if isinstance(regex, str) and _NEVER_EMPTY.fullmatch(regex):
            return max(1.0, content), 0.0
    return 1.0 + content, content


def _growth_of_tokens(step: dict[str, Any]) -> tuple[float, float]:
    """Returns how often a step repeats a text, and how many tokens it adds."""
    known = step.get("special_tokens")
    lengths = {
        name: len(token["ids"])
        for name, token in (known.items() if isinstance(known, dict) else ())
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    copies, most_added = 1.0, 0.0
    for name in ("single", "pair"):
        template = step.get(name)
        counts: dict[str, int] = {}
        added = 0.0
        for piece in template if isinstance(template, list) else ():
            for kind, one in piece.items() if isinstance(piece, dict) else ():
                label = str(one.get("id")) if isinstance(one, dict) else ""
                if kind == "SpecialToken":
                    added += lengths.get(label, 1)
                else:
                    counts[label] = counts.get(label, 0) + 1
        copies = max(copies, *counts.values(), 1)
        most_added = max(most_added, added)
    return copies, most_added


def _length(value: Any) -> float:
    """Returns the characters of a text after compatibility decomposition; 0 of other values."""
    return float(len(unicodedata.normalize("NFKD", value))) if isinstance(value, str) else 0.0


def _longest_of_map(value: Any) -> float:
    """Returns the longest text that a map of SentencePiece puts in the place of a character.

    It is base64 of the size of a trie in bytes, u32, the trie, and texts that end with a zero byte.
    """
    if isinstance(value, str) and len(value) > _MAP_CHARACTERS:
        return math.inf
    try:
        data = base64.b64decode(value)
    except (TypeError, ValueError):
        return 1.0  # tokenizers refuses it
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(1.0, *(_length(text.decode(errors="replace")) for text in texts))
