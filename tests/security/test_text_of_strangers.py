"""Names and texts of strangers do not act where they are shown: on a terminal, in a model card."""

from __future__ import annotations

import io

import pytest
from rich.markup import escape
from rich.table import Table

from codecllm.cli.console import SafeConsole
from codecllm.info import render
from codecllm.text import in_markdown, visible

HOSTILE = {
    "a color": "\x1b[31mred\x1b[0m",
    "a window title": "\x1b]0;title\x07",
    "a control of eight bits": "\x9b31m",
    "reordered text": "model\u202efdp.exe",
    "isolates": "\u2066a\u2069",
    "a zero-width space": "to\u200bken",
    "a carriage return": "fine\roverwritten",
    "markup": "[red]a[/red] [link=file:///etc/passwd]b[/link] :smile:",
    "a line separator": "a\u2028b",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_text_on_a_terminal_is_shown_and_not_obeyed(name):
    text = HOSTILE[name]
    out = io.StringIO()
    console = SafeConsole(file=out, force_terminal=True, width=200)
    table = Table(box=None)
    table.add_column("name")
    table.add_row(escape(text))
    console.print(f"tensor {text}", markup=False)
    console.print(table)
    shown = out.getvalue()
    assert shown.count(visible(text)) == 2
    for char in set(text) - set(visible(text)):
        assert char not in shown.replace("\x1b[1m", "").replace("\x1b[0m", ""), ascii(char)


def test_other_scripts_and_lines_stay():
    text = "größe 模型\n\t😀"
    assert visible(text) == text


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "[a](http://x)", "1 | 2\n\n# head", "`a`", "![x](y)"]
)
def test_text_in_a_model_card_makes_no_tag_link_cell_or_line(text):
    escaped = in_markdown(text)
    assert "\n" not in escaped
    for index, char in enumerate(escaped):
        if char in "<>[]()|`#!":
            assert escaped[index - 1] == "\\", escaped


def test_info_shows_the_names_of_tensors_as_they_are():
    name = "[red]w[/red]\x1b[2J\u202e"
    out = io.StringIO()
    console = SafeConsole(file=out, width=200)
    row = {"name": name, "dtype": "F32", "shape": [2], "scheme": "alias", "fallback": None}
    row |= {"column_scales": False, "wide": False, "alias_of": "[link=x]y[/link]"}
    facts = {
        "tensors": [row], "source": {"repo": "[b]r[/b]", "commit": "\x9b1m"}, "options": {},
        "source_dtypes": {"F32": 8}, "format_version": "1.1", "scheme": "int8", "codec": "zstd",
        "source_bytes": 8, "weights": 2, "container_bytes": 8, "shards": [1], "ratio": 1.0,
        "bits_per_weight": 32.0, "entropy_bits_per_weight": 32.0, "manifest_sha256": "ab",
    }  # fmt: skip
    render(facts, console)
    shown = out.getvalue()
    assert visible(name) in shown
    assert "[b]r[/b]" in shown
    assert not {"\x1b", "\u202e", "\x9b"} & set(shown)
