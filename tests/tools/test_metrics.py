"""The figures of `tools.metrics` on small trees that are made here."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from tools import metrics
from tools.code_figures import is_bare_participle, measure
from tools.import_graph import ImportGraph
from tools.source_files import SourceFile, source_files, stub_modules
from tools.wrap_docstrings import wrap_source
from tools.wrap_markdown import wrap


def source(text, path="formats/one.py"):
    return SourceFile(Path(path), textwrap.dedent(text).lstrip())


def test_words_names_comments_and_docstrings_are_counted():
    figures = measure(
        source(
            '''
            """What a module holds, and who reads it."""

            def public(held, wanted_bytes):
                """Adds."""
                found = held  # a reason
                total, kept = found, 1
                return total + kept

            def without():
                return [used for used in range(3)]

            def _private():
                pass
            '''
        )
    )
    assert (figures.dialect_words, figures.docstring_words) == (2, 9)
    assert figures.dialect == pytest.approx(1000 * 2 / 9)
    assert dict(figures.participles) == {"found": 1, "kept": 1, "used": 1}
    assert figures.local_names == 4
    assert (figures.documented_functions, figures.public_functions) == (1, 2)
    assert (figures.code_lines, figures.comment_lines) == (8, 1)


def test_lines_of_docstrings_count_for_the_longest():
    figures = measure(source(f'"""{"x" * 100}"""\n'))
    assert (figures.longest_line, figures.long_lines) == (106, 1)


@pytest.mark.parametrize("name", ["held", "_found", "stored", "own"])
def test_bare_participles(name):
    assert is_bare_participle(name)


@pytest.mark.parametrize("name", ["held_bytes", "seed", "expected", "index", "unsigned"])
def test_names_of_things_are_no_participles(name):
    assert not is_bare_participle(name)


def test_circles_of_lazy_and_typing_imports_are_seen():
    files = [
        source("from codecllm.formats import two\nx = 1\n", "formats/one.py"),
        source("def f():\n    from codecllm.formats.three import g\n", "formats/two.py"),
        source(
            "if TYPE_CHECKING:\n    from codecllm.formats.one import x\ndef g(): ...\n",
            "formats/three.py",
        ),
        source("x = 1\n", "formats/apart.py"),
        source("", "formats/__init__.py"),
    ]
    graph = ImportGraph(files)
    assert graph.circles() == [
        ["codecllm.formats.one", "codecllm.formats.three", "codecllm.formats.two"]
    ]
    assert graph.unresolved == []


def test_names_that_a_module_does_not_bind_do_not_resolve():
    files = [
        source("from codecllm.formats.two import a, b\n"),
        source("def a(): ...\n", "formats/two.py"),
    ]
    assert ImportGraph(files).unresolved == ["formats/one.py:1: codecllm.formats.two.b"]


def test_imports_of_absent_modules_are_named():
    graph = ImportGraph([source("import numpy\nimport codecllm.nowhere\n")])
    assert graph.unresolved == ["formats/one.py:2: codecllm.nowhere"]


def test_compiled_modules_import_nothing():
    files = [
        source("from codecllm.formats import _core\n", "formats/one.py"),
        source("def __getattr__(name): ...\nimport codecllm.formats.one\n", "formats/__init__.py"),
    ]
    assert ImportGraph(files).circles() != []
    graph = ImportGraph(files, {"codecllm.formats._core"})
    assert (graph.circles(), graph.unresolved) == ([], [])


def test_links_are_counted_once(tmp_path):
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "one.py").write_text("x = 1\n")
    (tmp_path / "codecllm").mkdir()
    (tmp_path / "codecllm" / "formats").symlink_to("../formats")
    files = list(source_files(("codecllm", "formats"), tmp_path))
    assert [file.module for file in files] == ["codecllm.formats.one"]


def test_side_tensors_are_looked_for_in_strings_but_not_in_docstrings():
    spelled = [
        source('name = f"{x}_chunks"\n', "formats/a.py"),
        source('"""X_chunks and _chunks."""\nname = "of_chunks"\n', "formats/b.py"),
    ]
    assert metrics.side_tensor_figure(spelled).places == ("formats/a.py",)


def test_prose_is_wrapped_and_all_else_kept():
    text = (
        "# A heading that stays where it is\n\n"
        + "word " * 30
        + "\n\n| a table | "
        + "cell " * 30
        + "|\n\n    code    stays\n\n```\nfenced  code\n```\n"
    )
    wrapped = wrap(text)
    assert max(len(line) for line in wrapped.splitlines() if "|" not in line) <= 100
    assert "    code    stays\n\n```\nfenced  code\n```\n" in wrapped
    assert wrap(wrapped) == wrapped
    assert metrics.wrapping_faults(wrapped) == ()
    assert len(metrics.wrapping_faults(text)) == 1


def test_no_line_begins_with_a_sign_of_markdown():
    wrapped = wrap("a " + "x" * 97 + " - y\n")
    assert not any(line.startswith("-") for line in wrapped.splitlines())


def test_items_of_lists_are_wrapped_each_for_itself():
    text = "- " + "word " * 25 + "\n- two\n  goes on\n1. three\n\n   of three\n   too\n::: kept\n"
    lines = wrap(text).splitlines()
    assert lines[1].startswith("  word")
    assert lines[2:] == ["- two goes on", "1. three", "", "   of three too", "::: kept"]


def test_check_fails_where_a_bar_is_missed(monkeypatch, capsys):
    kept = metrics.Figure("one", 1, 2)
    monkeypatch.setattr(metrics, "all_figures", lambda: [kept])
    assert metrics.main(["--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["kept"] is True
    monkeypatch.setattr(metrics, "all_figures", lambda: [kept, metrics.Figure("two", 3, 2)])
    assert metrics.main(["--json"]) == 0
    assert metrics.main(["--check", "--json"]) == 1
    assert "missed: two" in capsys.readouterr().err


def test_every_import_of_ours_resolves():
    folders = (*metrics.PACKAGE_FOLDERS, *metrics.TOOL_FOLDERS, *metrics.TEST_FOLDERS)
    assert ImportGraph(source_files(folders), stub_modules(folders)).unresolved == []


def test_docstrings_are_wrapped_and_programs_stay():
    long_words = "word " * 30
    text = textwrap.dedent(
        f'''
        def f(a):
            """Returns.

            {long_words}end.

                literal {long_words}

            Args:
                a: {long_words}
                b: short.

            Returns:
                A thing: {long_words}
            """
            # {long_words}
            return "{long_words}"
        '''
    )
    wrapped, too_long = wrap_source(text)
    lines = wrapped.splitlines()
    assert [lines[number - 1].split()[0] for number in too_long] == ["literal", "return"]
    assert wrap_source(wrapped) == (wrapped, too_long)
    entry = next(number for number, line in enumerate(lines) if line.startswith("        a: "))
    assert lines[entry + 1].startswith("            word")
    assert lines[next(n for n, line in enumerate(lines) if "A thing" in line) + 1][8] == "w"
    assert sum(line.startswith("    # word") for line in lines) == 2
