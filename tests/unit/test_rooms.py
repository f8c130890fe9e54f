"""The house: imports run one way, and formats, hub and converter run without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "formats": {"formats"},
    "hub": {"hub", "formats"},
    "converter": {"converter", "hub", "formats"},
    "loader": {"loader", "hub", "formats"},
    "serving": {"serving", "loader", "hub", "formats"},
    "calibrator": {"calibrator", "loader", "converter", "hub", "formats"},
    "verifier": {"verifier", "loader", "converter", "hub", "formats"},
}
_WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "accelerate"}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
"""


def _modules(room):
    return sorted((ROOT / room).rglob("*.py"))


def _imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module, node


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    assert _modules(room)
    for path in _modules(room):
        for name, node in _imported(ast.parse(path.read_text())):
            parts = name.split(".")
            if parts[0] == "codecllm" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[room], f"{path}:{node.lineno} imports {name}"
            assert parts[0] not in MAY_IMPORT, (
                f"{path}:{node.lineno} imports {name} without 'codecllm.'"
            )


@pytest.mark.parametrize("room", ["formats", "converter"])
def test_no_torch_in_the_source_of_a_room(room):
    for path in _modules(room):
        names = {name.split(".")[0] for name, _ in _imported(ast.parse(path.read_text()))}
        assert not names & {"torch", "transformers"}, path


def _run(code, *arguments):
    command = [sys.executable, "-c", _WITHOUT + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_conversion_needs_neither_torch_nor_transformers(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    weights = np.random.default_rng(0).standard_normal((256, 300)).astype(np.float32)
    save_file({"w": weights, "b": np.ones(7, np.float32)}, source / "model.safetensors")
    done = _run(
        """
        from codecllm.cli import main
        sys.argv = ["codecllm", "convert", sys.argv[1], sys.argv[2], "--no-baseline"]
        main()
        """,
        source,
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "codecllm.json").exists()
    for command in ("info", "verify"):
        more = ["--level", "checksums"] if command == "verify" else []
        done = _run("from codecllm.cli import main\nmain()", command, tmp_path / "out", *more)
        assert done.returncode == 0, done.stderr


def test_importing_the_front_door_is_light():
    rooms = ("formats", "hub", "converter", "verifier", "verifier.diagnosis")
    done = _run("import codecllm\n" + "\n".join(f"import codecllm.{room}" for room in rooms))
    assert done.returncode == 0, done.stderr


def test_every_function_of_a_public_module_has_a_home():
    import codecllm

    for name in codecllm.__all__:
        if name != "from_pretrained":  # its room needs torch
            assert getattr(codecllm, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = codecllm.nothing
