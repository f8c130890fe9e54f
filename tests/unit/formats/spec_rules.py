"""The tables of SPEC.md as data, and the rules of refusal that stand in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SPEC = Path(__file__).resolve().parents[3] / "SPEC.md"


@dataclass(frozen=True)
class Rule:
    """One fault that a reader must refuse.

    Attributes:
        name: section and letter.
        fault: the words of the table.
        error: class of the error, or the words of the table where there are several.
        verifier_only: whether only a verifier has to see it.
    """

    name: str
    fault: str
    error: str
    verifier_only: bool


def tables(section: str, text: str | None = None) -> list[list[list[str]]]:
    """Returns the tables of a section, by the beginning of its heading, as rows of cells."""
    parts = re.split(r"\n#+ ", SPEC.read_text() if text is None else text)
    return _tables_of(next(part for part in parts if part.startswith(section)))


def spec_rules() -> dict[str, Rule]:
    """Returns all rules of SPEC.md by name, in the order of the text."""
    found: dict[str, Rule] = {}
    for table in _tables_of(SPEC.read_text()):
        header = table[0]
        if "rule" not in header or "error" not in header:
            continue
        fault = next(place for place, cell in enumerate(header) if "MUST refuse" in cell)
        for row in table[1:]:
            name, error = row[header.index("rule")], row[header.index("error")]
            if name and name not in found:
                words = row[fault]
                found[name] = Rule(name, words, error, words.startswith("(v)"))
    return found


def _tables_of(text: str) -> list[list[list[str]]]:
    result: list[list[list[str]]] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            del rows[1]  # the ruler
            result.append(rows)
            rows = []
    return result
