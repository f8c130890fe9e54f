"""Names and texts of strangers do not act where they are shown: on a terminal, in a model card."""

from __future__ import annotations

import io
import os
import pty
import sys

import numpy as np
import pytest
from rich.markup import escape
from rich.table import Table

from codecllm.cli.console import SafeConsole
from codecllm.info import render
from codecllm.text import in_markdown, visible
from tests.sources import write_source

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


def _on_a_terminal(*command):
    """Returns the exit code of a process on a terminal of its own, and what it wrote there."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        os.execve(command[0], command, os.environ | {"TERM": "xterm-256color", "COLUMNS": "300"})
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode()


_NAMES = (
    "[/x]",
    "[red]A[/red]",
    "[link=file:///etc/passwd]B",
    "C\x9b31mD\u202eE\nF\tG\x1b[2J",
    "\\[/y]",
    "Z\\",
)


_BARS = """
import sys
from codecllm.cli.console import progress_bar
from codecllm.loader.progress import metered
from time import sleep

names = sys.argv[1:]
with progress_bar("verifying", True) as advance:
    for done, name in enumerate(names, 1):
        advance(name, done << 20, len(names) << 20)
        sleep(0.25)  # longer than between two pictures of a bar
with metered(True, len(names) << 20) as meter:
    for name in names:
        meter.add(name, 1 << 20)
        sleep(0.25)
"""


def test_names_in_progress_bars_are_shown_and_not_obeyed():
    code, shown = _on_a_terminal(sys.executable, "-c", _BARS, *_NAMES)
    assert code == 0, shown[-2000:]
    for name in _NAMES:
        assert ascii(name)[1:-1].replace("\\\\", "\\") in shown.replace("\\\\", "\\")
    assert not {"\x9b", "\u202e"} & set(shown)
    assert "\x1b]8;" not in shown
    assert "\x1b[2J" not in shown


def test_a_conversion_on_a_terminal_takes_brackets_in_names(tmp_path):
    # More than one picture of the bar needs some megabytes.
    weights = np.random.default_rng(0).normal(0, 1, (1500, 2000)).astype(np.float32)
    source = write_source(tmp_path / "src", dict.fromkeys(_NAMES[:3], ("F32", weights)))
    convert = ("convert", str(source), str(tmp_path / "out"), "--scheme", "lossless")
    code, shown = _on_a_terminal(sys.executable, "-m", "codecllm", *convert, "--no-baseline")
    assert code == 0, shown[-2000:]
    assert "\x1b]8;" not in shown
