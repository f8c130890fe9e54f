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

from codecllm.formats.errors import LimitError, SchemaError, shown

MOST_GROWTH = 64
"""How many times as long a normalizer, pre-tokenizer or decoder may make a text.

The maps of SentencePiece come to 18: one Arabic ligature stands for so many characters.
"""

MOST_TOGETHER = 256
"""How many times as long a normalizer and a pre-tokenizer together may make a text.

Marks of three bytes behind a map of SentencePiece come to 72.
"""

MOST_COPIES = 2
"""How often a post-processor may repeat a text."""

MOST_ADDED = 4096
"""Characters or tokens that are added to a text, whatever its length."""

MOST_STEPS = 1024
"""Steps of a normalizer, pre-tokenizer, post-processor or decoder."""

_OF_TEXTS = (
    *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt"),
    *("Precompiled", "Prepend", "Replace", "Sequence", "Strip", "StripAccents"),
)
_OF_PIECES = (
    *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength"),
    *("Metaspace", "Punctuation", "Sequence", "Split", "UnicodeScripts", "Whitespace"),
    "WhitespaceSplit",
)
_OF_TOKENS = (
    *("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace"),
    *("Sequence", "Strip", "WordPiece"),
)
_BEHIND = ("BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing")

_MAP_CHARACTERS = 1 << 20  # of base64; the map of most models of SentencePiece has 320,012

# Patterns of which each match has a character or more. Any other may match at every place.
_NEVER_EMPTY = re.compile(
    r"(?:[^\\()|?*{}^$]|\\[sdwSDWntr]|\{[1-9][0-9]*(?:,(?:[1-9][0-9]*)?)?\})+"
)
# Factors in characters after compatibility decomposition, in which Unicode's own forms grow none.
_FACTORS = {"ByteLevel": 12.0, "BertNormalizer": 3.0}
_LISTS = ("normalizers", "pretokenizers", "processors", "decoders")


def check_growth(document: dict[str, Any], file: str) -> None:
    """Refuses a tokenizer that can make texts, or tokens, far longer than they are.

    Args:
        document: the JSON object of tokenizer.json. Entries of a wrong type are left to tokenizers.
        file: its name.

    Raises:
        SchemaError: a step has a type that is not known here. Of a step without a type, tokenizers
            makes whatever its entries fit.
        LimitError: its normalizer, pre-tokenizer or decoder makes a text more than 64 times as
            long, or the first two together more than 256 times, its post-processor repeats a text
            more than twice, or one of them adds more than 4,096 characters or tokens or has more
            than 1,024 steps.
    """
    before = 1.0
    for part, kinds, most, growth_of in (
        ("normalizer", _OF_TEXTS, MOST_GROWTH, growth_of_text),
        ("pre_tokenizer", _OF_PIECES, MOST_GROWTH, growth_of_pieces),
        ("decoder", _OF_TOKENS, MOST_GROWTH, growth_of_decoded),
        ("post_processor", _BEHIND, MOST_COPIES, _growth_of_tokens),
    ):
        factor, added = 1.0, 0.0
        for number, step in enumerate(_steps(document.get(part))):
            if number > MOST_STEPS:
                raise LimitError(
                    f"{part} has too many steps", file=file, expected=f"at most {MOST_STEPS}"
                )
            kind = step.get("type") if isinstance(step, dict) else step
            if not isinstance(step, dict) or kind not in kinds:
                raise SchemaError(f"{part} has a step of no known type", file=file, got=shown(kind))
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
        if part == "pre_tokenizer" and before * factor > MOST_TOGETHER:
            raise LimitError(
                "normalizer and pre_tokenizer can make a text far longer",
                file=file,
                got=f"{before * factor:.3g} times",
                expected=f"at most {MOST_TOGETHER} times",
            )
        before = factor


def _steps(value: Any) -> Iterator[Any]:
    """Yields the steps of a sequence of sequences, in order; nothing of None."""
    stack = [] if value is None else [value]  # without recursion: a file may be nested deeply
    while stack:
        step = stack.pop()
        yield step
        for name in _LISTS:
            steps = step.get(name) if isinstance(step, dict) else None
            if isinstance(steps, list):
                stack += reversed(steps)


def growth_of_text(step: dict[str, Any]) -> tuple[float, float]:
    """Returns by what factor a step makes a text longer, and how many characters it adds.

    Args:
        step: the JSON object of one step of a normalizer.

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


def growth_of_pieces(step: dict[str, Any]) -> tuple[float, float]:
    """As `growth_of_text`, of a step of a pre-tokenizer, which may begin every piece anew.

    Lengths are those in bytes: a piece has one or more.
    """
    kind = step.get("type")
    if kind == "ByteLevel":  # a character of two bytes for each, and for the space before a piece
        return (2.0 if step.get("add_prefix_space") is False else 4.0), 0.0
    if kind == "Metaspace":
        mark = step.get("replacement")
        return 1.0 + (len(mark.encode(errors="replace")) if isinstance(mark, str) else 0), 0.0
    return 1.0, 0.0


def growth_of_decoded(step: dict[str, Any]) -> tuple[float, float]:
    """As `growth_of_text`, of a step of a decoder, in characters of each token."""
    kind = step.get("type")
    if kind == "WordPiece":
        return 1.0, 1.0
    if kind in ("BPEDecoder", "CTC"):
        mark = step.get("suffix" if kind == "BPEDecoder" else "word_delimiter_token")
        # An empty one is found before, between and behind all characters.
        return (1.0, 0.0) if mark else (3.0, 1.0)
    return growth_of_text(step)


def _growth_of_tokens(step: dict[str, Any]) -> tuple[float, float]:
    """Returns how often a step repeats a text, and how many tokens it adds."""
    if step.get("type") in ("BertProcessing", "RobertaProcessing"):
        return 1.0, 4.0
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
