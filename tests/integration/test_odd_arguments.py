"""Odd values of every argument of the public functions: one typed error, or a result.

The arguments come from the signatures, so that a new one is covered as soon as it is there.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import codecllm
from codecllm import api, converter
from codecllm.bench import BenchOptions, bench
from codecllm.converter import ConvertOptions, Rate
from codecllm.converter.exports.export import export as export_folder
from codecllm.formats.errors import CodecLLMError, UsageError
from codecllm.generation import generate
from codecllm.hub import check_login, open_remote, read_base_model, resolve
from codecllm.info import describe_name
from codecllm.loader import stream_tensors
from codecllm.publishing import push
from codecllm.serving.loading import LoadOptions, find_folder, split_options
from codecllm.verifier import record_baseline
from codecllm.verifier.diagnosis import DiagnoseOptions
from codecllm.verifier.evaluation import evaluate, evaluate_tasks
from codecllm.verifier.evaluation.plot import check_plot
from codecllm.verifier.model_comparison import compare_models
from codecllm.verifier.signature import Signer, sign
from tests.integration import tiny_models

ODD: list[Any] = [
    None,
    True,
    5,
    -1,
    1.5,
    float("nan"),
    10**40,
    10**5000,
    "",
    "4",
    "\udcff",
    b"x",
    [5],
    ["\udcff"],
    {"a": 1},
    object(),
]

Arguments = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    folder = tiny_models.llama(tmp_path_factory.mktemp("odd") / "model")
    tokenizer = Tokenizer(WordLevel({f"t{n}": n for n in range(512)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return folder


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    """The model's container."""
    out = model.parent / "container"
    converter.convert(model, out)
    return out


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets names of folders lie in one that is removed, and Hub ids lead nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def _stream(container: Any, **arguments: Any) -> list[Any]:
    return list(stream_tensors(container, **arguments))


def _split(**arguments: Any) -> Any:
    return split_options(arguments)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Arguments]] = {
    # name -> what has the signature, what is called, arguments that work ("MODEL", "CONTAINER",
    # "OUT" and "COPY", a container of one's own, stand for paths)
    "convert": (
        codecllm.convert,
        codecllm.convert,
        {"model": "MODEL", "out": "OUT", "baseline": False},
    ),
    "convert_folder": (converter.convert, converter.convert, {"source": "MODEL", "out": "OUT"}),
    "predict": (api.predict, api.predict, {"model": "MODEL", "options": ConvertOptions()}),
    "run_conversion": (
        api.run_conversion,
        api.run_conversion,
        {"model": "MODEL", "out": "OUT", "options": ConvertOptions(), "baseline": False},
    ),
    "access": (api.HubAccess, api.HubAccess, {}),
    "options": (ConvertOptions, ConvertOptions, {}),
    "rate": (Rate, Rate, {"bits": 5}),
    "ratio": (Rate, Rate, {"ratio": 3}),
    "export": (codecllm.export, codecllm.export, {"container": "CONTAINER", "out": "OUT"}),
    "export_folder": (export_folder, export_folder, {"container": "CONTAINER", "out": "OUT"}),
    "verify": (codecllm.verify, codecllm.verify, {"name_or_path": "CONTAINER"}),
    "diagnose": (
        codecllm.diagnose,
        codecllm.diagnose,
        {"name_or_path": "CONTAINER", "source": "MODEL"},
    ),
    "diagnose_options": (DiagnoseOptions, DiagnoseOptions, {}),
    "from_pretrained": (
        codecllm.from_pretrained,
        codecllm.from_pretrained,
        {"name_or_path": "CONTAINER"},
    ),
    "stream_tensors": (stream_tensors, _stream, {"container": "CONTAINER"}),
    "generate": (
        generate,
        generate,
        {"out": "CONTAINER", "prompt": "t1 t2", "max_new_tokens": 2},
    ),
    "compare_models": (compare_models, compare_models, {"a": "CONTAINER", "b": "MODEL"}),
    "evaluate": (
        evaluate,
        evaluate,
        {"base": "MODEL", "candidates": ["CONTAINER"], "text": "t1 t2 t3 t4"},
    ),
    "record_baseline": (
        record_baseline,
        record_baseline,
        {"out": "COPY", "source_folder": "MODEL"},
    ),
    "bench_options": (BenchOptions, BenchOptions, {}),
    "describe_name": (describe_name, describe_name, {"name": "CONTAINER"}),
    "resolve": (resolve, resolve, {"name_or_path": "CONTAINER"}),
    "find_folder": (find_folder, find_folder, {"model": "CONTAINER"}),
    "load_options": (LoadOptions, _split, {}),
    "signer": (Signer, Signer, {}),
    "plot": (check_plot, check_plot, {"path": "a.svg"}),
}
"""Functions whose arguments work here as they stand."""

REFUSED: dict[str, tuple[Callable[..., Any], Callable[..., Any], Arguments]] = {
    "bench": (bench, lambda *a, **k: next(bench(*a, **k)), {"out": "x/y", "options": None}),
    "push": (push, push, {"container": "CONTAINER", "repo": "x/y"}),
    "check_login": (check_login, check_login, {"repo": "x/y"}),
    "read_base_model": (read_base_model, read_base_model, {"repo": "x/y"}),
    "open_remote": (open_remote, open_remote, {"name": "x/y"}),
    "sign": (sign, sign, {"container": "CONTAINER", "private_key": "no-key"}),
    "evaluate_tasks": (
        evaluate_tasks,
        evaluate_tasks,
        {"base": "MODEL", "candidates": [], "tasks": ["no-such-task"]},
    ),
}
"""Functions that end in a typed error in any case: they need the Hub, a key or other packages."""


def _parameters() -> Iterator[Any]:
    for name, (signed, _, _) in (CASES | REFUSED).items():
        for parameter in inspect.signature(signed).parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                yield pytest.param(name, parameter.name, id=f"{name}-{parameter.name}")


def _prepared(given: Arguments, model: Path, packed: Path, tmp_path: Path) -> Arguments:
    paths = {"MODEL": model, "CONTAINER": packed, "OUT": tmp_path / "out", "COPY": tmp_path / "c"}
    shutil.rmtree(paths["OUT"], ignore_errors=True)
    if "COPY" in given.values():
        shutil.copytree(packed, paths["COPY"], dirs_exist_ok=True)

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(one) for one in value]
        return paths.get(value, value) if isinstance(value, str) else value

    return {name: place(value) for name, value in given.items()}


@pytest.mark.parametrize(("name", "parameter"), list(_parameters()))
def test_an_odd_argument_is_one_typed_error(name, parameter, model, packed, tmp_path):
    _, call, given = (CASES | REFUSED)[name]
    surprises = []
    for number, odd in enumerate(ODD):
        arguments = _prepared(given, model, packed, tmp_path) | {parameter: odd}
        try:
            call(**arguments)
        except (CodecLLMError, FileNotFoundError):
            continue
        except Exception as exc:  # any other class is what this test looks for
            surprises.append(f"ODD[{number}]: {type(exc).__name__}: {exc}")
    assert not surprises


def _counts() -> Iterator[Any]:
    for name, (signed, _, _) in (CASES | REFUSED).items():
        for parameter in inspect.signature(signed).parameters.values():
            if parameter.annotation in ("int", "int | None", "float", "float | None"):
                yield pytest.param(name, parameter.name, id=f"{name}-{parameter.name}")


@pytest.mark.parametrize(("name", "parameter"), list(_counts()))
def test_a_number_of_numpy_means_what_it_means_in_python(name, parameter, model, packed, tmp_path):
    """Also where a product with it passes the range of its type, as KiB in bytes do."""
    _, call, given = (CASES | REFUSED)[name]
    outcomes = []
    for number in (8, np.int8(8)):
        try:
            call(**_prepared(given, model, packed, tmp_path) | {parameter: number})
            outcomes.append("")
        except CodecLLMError as exc:
            outcomes.append(str(exc).replace("np.int8(8)", "8"))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", CASES)
def test_the_arguments_that_stand_beside_it_work(name, model, packed, tmp_path):
    _, call, given = CASES[name]
    call(**_prepared(given, model, packed, tmp_path))


def test_every_public_function_is_among_them():
    functions = {name for name in codecllm.__all__ if callable(getattr(codecllm, name))}
    assert functions <= CASES.keys() | REFUSED.keys()


@pytest.mark.parametrize(
    "kind", [ConvertOptions, Rate, DiagnoseOptions, BenchOptions, Signer, api.HubAccess]
)
def test_options_refuse_an_object_in_every_field(kind):
    given: Arguments = {"bits": 5} if kind is Rate else {}
    for field in fields(kind):
        with pytest.raises(UsageError):
            kind(**given | {field.name: object()})
