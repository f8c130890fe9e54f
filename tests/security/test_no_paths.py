"""Arguments that are no paths, in every public function that takes one: one error that names it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import codecllm
from codecllm.api import HubAccess, predict
from codecllm.bench import BenchOptions
from codecllm.converter import ConvertOptions
from codecllm.formats.errors import UsageError
from codecllm.verifier.evaluation import evaluate, evaluate_tasks

NO_PATHS: tuple[Any, ...] = (
    *(3, 3.5, True, b"folder", bytearray(b"x"), ["folder"], ("folder",), {"a": 1}, {1}, slice(1)),
    *("", "a\0b", "\0", "folder/\0", Path("a\0b"), "\ud800", Path("\ud800"), "a" * 300 + "\0"),
)
ENGINES = ("sglang", "vllm")
"""Modules that need an engine, and take no paths of a caller."""


class Strange:
    """Says that it is a path and is none."""

    def __fspath__(self) -> Any:
        return b"bytes"


class Broken:
    """Says that it is a path and fails."""

    def __fspath__(self) -> str:
        raise TypeError("no")


def modules() -> list[ModuleType]:
    names = [found.name for found in pkgutil.walk_packages(codecllm.__path__, "codecllm.")]
    engines = [name for name in names if name.rpartition(".")[2].startswith(ENGINES)]
    return [importlib.import_module(name) for name in names if name not in engines]


def public_functions() -> dict[str, Callable[..., Any]]:
    """Returns functions and classes by their full names."""
    found = {}
    for module in modules():
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and not name.startswith("_") and callable(value):
                found[f"{module.__name__}.{name}"] = value
    return found


def path_parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Returns the parameters of a function that are paths of a caller; True: None is none."""
    target = function.__init__ if inspect.isclass(function) else function
    return {
        name: "None" not in annotation
        for name, annotation in getattr(target, "__annotations__", {}).items()
        if isinstance(annotation, str) and "str | Path" in annotation and "[" not in annotation
        if name != "return"
    }


FUNCTIONS = {
    name: function for name, function in public_functions().items() if path_parameters(function)
}

# What a function needs besides its paths.
OPTIONS = ConvertOptions()
OTHERS: dict[str, dict[str, Any]] = {
    "codecllm.api.run_conversion": {"options": OPTIONS},
    "codecllm.api.predict": {"options": OPTIONS},
    "codecllm.api.convert": {"bits": 4},
    "codecllm.bench.bench.bench": {"options": BenchOptions()},
    "codecllm.converter.conversion.convert_model": {"model": None, "options": OPTIONS},
    "codecllm.converter.options.Rate": {"bits": 4},
    "codecllm.converter.options.requested_rate": {"bits": 4},
    "codecllm.converter.plan.conversion_plan.open_source": {"options": OPTIONS},
    "codecllm.converter.write.staging.Staging": {"force": False},
    "codecllm.generation.generate": {"prompt": "w1"},
    "codecllm.publishing.push": {"repo": "user/name"},
    "codecllm.verifier.evaluation.evaluate.evaluate": {"candidates": ["nothing"]},
    "codecllm.verifier.evaluation.tasks.evaluate_tasks": {"candidates": [], "tasks": ["none"]},
    "codecllm.verifier.signature.check_signature": dict.fromkeys(
        ("folder", "signer", "verifier", "stage", "from_hub")
    ),
}
# A record looks at nothing: the function that takes it does.
RECORDS = {
    "codecllm.api.HubAccess": lambda cache_dir: predict(
        "user/name", OPTIONS, HubAccess(cache_dir=cache_dir)
    )
}


@pytest.fixture
def places(container, tmp_path):
    """Paths for the parameters that a test does not break, by name."""
    source, made = container.parent / "source", {"out": tmp_path / "out"}
    names = ("model", "source", "source_folder")
    return dict.fromkeys(names, source) | made


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    result = function(**arguments)
    if inspect.isgenerator(result):
        next(result)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_that_is_no_path_is_one_error(name, container, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = RECORDS.get(name, FUNCTIONS[name])
    parameters = path_parameters(FUNCTIONS[name])
    needed = [parameter for parameter, needs in parameters.items() if needs]
    for broken in parameters:
        values = (*NO_PATHS, Strange(), Broken(), *((None,) if broken in needed else ()))
        for value in values:
            others = {one: places.get(one, container) for one in needed if one != broken}
            with pytest.raises(UsageError, match="is no path") as caught:
                call(function, {**others, **OTHERS.get(name, {}), broken: value})
            assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", NO_PATHS, ids=ascii)
def test_so_is_a_candidate(value, container):
    for run, more in ((evaluate, {}), (evaluate_tasks, {"tasks": ["none"]})):
        with pytest.raises(UsageError, match="is no path"):
            run(container, [container, value], **more)


def test_every_function_of_the_reference_is_among_them():
    text = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    names = [line.split()[1] for line in text.splitlines() if line.startswith(":::")]
    functions = {name for name in names if name.rpartition(".")[2][0].islower()}
    taking = {name for name in functions if name in public_functions()}
    assert len(taking) > 8
    assert taking <= FUNCTIONS.keys()
