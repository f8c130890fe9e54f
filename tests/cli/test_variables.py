"""A variable that a library refuses when it is imported: one error that names the variable."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

from codecllm.cli.variables import refused_variable

LIBRARIES = {
    "in the line": 'import os\nX = int(os.environ.get("ITS_OWN", 1))\n',
    "in several lines": """
import os
X = int(
    os.environ.get(
        'ITS_OWN', 1
    )
)
""",
    "in a line before": """
import os
X = os.environ["ITS_OWN"]
if X not in "01":
    raise ImportError(f"no policy: {X}")
""",
    "in a function": """
import os
def _read():
    value = os.environ["ITS_OWN"]
    return int(value)
X = _read()
""",
    "by a constant": """
import os
NAME = "ITS_OWN"
def _parse(value):
    raise ValueError("no such log")
def _read():
    value = os.environ.get(NAME)
    return _parse(value)
_read()
""",
    "wrapped": """
import os
try:
    X = int(os.environ["ITS_OWN"])
except ValueError as exc:
    raise RuntimeError("cannot import") from exc
""",
}


def _error_of(text, folder, monkeypatch):
    (folder / "its_library.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "its_library", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any type
        importlib.import_module("its_library")
    return caught.value


@pytest.mark.parametrize("case", LIBRARIES)
def test_the_variable_is_named(tmp_path, monkeypatch, case):
    monkeypatch.setenv("ITS_OWN", "wrong-value")
    error = refused_variable(_error_of(LIBRARIES[case], tmp_path, monkeypatch))
    assert error is not None
    assert error.exit_code == 3
    assert str(error).startswith("ITS_OWN of the environment is refused when a library is imported")


@pytest.mark.parametrize(
    "text",
    [
        "int('x')",
        "import os\nX = os.environ['ITS_OWN']\nraise ValueError('another reason')",
        "import os\nX = os.environ.get('NOT_SET')\nint('x')",
    ],
)
def test_other_failures_of_an_import_are_not_taken_for_it(tmp_path, monkeypatch, text):
    monkeypatch.setenv("ITS_OWN", "value")
    assert refused_variable(_error_of(text, tmp_path, monkeypatch)) is None


def test_failures_behind_the_import_are_not_taken_for_it(monkeypatch):
    monkeypatch.setenv("ITS_OWN", "x")
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int(os.environ["ITS_OWN"])
    assert refused_variable(caught.value) is None


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("PYTHON_ZSTANDARD_IMPORT_POLICY", ["info", "out", "--json"]),  # while commands are made
        ("TORCH_LOGS", ["doctor", "--json"]),  # while one runs
    ],
)
def test_a_command_names_it(name, arguments):
    done = subprocess.run(
        [sys.executable, "-m", "codecllm", *arguments],
        capture_output=True,
        check=False,
        env={**os.environ, name: "no-such-value"},
    )
    facts = json.loads(done.stdout)
    assert (done.returncode, facts["error"]) == (3, "UnsupportedEnvironmentError")
    assert facts["message"].startswith(f"{name} of the environment is refused")
    assert not done.stderr
