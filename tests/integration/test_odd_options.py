"""Odd values of every option of the command line: one typed error, or a result.

The options come from the commands, so that a new one is covered as soon as it is there.
"""

from __future__ import annotations

import huggingface_hub.constants
import pytest
import typer
from typer.testing import CliRunner

from codecllm import converter
from codecllm.cli import checking, converting, reading  # noqa: F401  (they add the commands)
from codecllm.cli.app import app
from codecllm.formats.errors import CodecLLMError, UsageError
from tests.integration import tiny_models

NO_TEXT, HUGE = "\udcff", "9" * 20
ARGUMENTS = {
    "model": "MODEL",
    "out": "CONTAINER",
    "container": "CONTAINER",
    "prompt": "x",
    "repo": "x/y",
    "a": "MODEL",
    "b": "CONTAINER",
    "base": "MODEL",
    "candidates": "CONTAINER",
    "private_key": "no-key",
}
COMMANDS = typer.main.get_command(app).commands


def _options():
    for name, command in COMMANDS.items():
        for option in command.params:
            if option.param_type_name == "option" and not option.is_flag:
                yield pytest.param(name, option.name, option.opts[0], id=f"{name}{option.opts[0]}")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    model = tiny_models.llama(tmp_path_factory.mktemp("odd") / "model")
    converter.convert(model, model.parent / "container")
    return {"MODEL": str(model), "CONTAINER": str(model.parent / "container")}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Keeps what a command writes in a folder that is removed, and every command off the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def _run(command, paths, *options):
    """Runs a command with arguments that fit; returns its exception, or None."""
    line = [command]
    for argument in COMMANDS[command].params:
        if argument.param_type_name == "argument":
            value = ARGUMENTS[argument.name]
            is_new = argument.name == "out" and command in ("convert", "export")
            line.append("new" if is_new else paths.get(value, value))
    result = CliRunner().invoke(app, [*line, *options])
    return result.exception


@pytest.mark.parametrize(("command", "name", "option"), list(_options()))
def test_an_odd_option_is_one_typed_error(command, name, option, paths):
    key = [] if name == "private_key" or command != "sign" else ["--private-key", "no-key"]
    for value in (NO_TEXT, HUGE, "-1", "", "nan"):
        error = _run(command, paths, *key, option, value)
        # click ends a command by itself at a wrong value; files that cannot be read are OSErrors.
        fits = (CodecLLMError, OSError, SystemExit, type(None))
        assert isinstance(error, fits), (value, type(error), error)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("convert", ("--include", NO_TEXT)),
        ("convert", ("--exclude", "a" + NO_TEXT)),
        ("convert", ("--max-shard-size", "9" * 38 + "GB")),
        ("export", ("--max-shard-size", "9" * 38 + "GB")),
        ("verify", ("--workers", HUGE)),
        ("bench", ("--prompt-tokens", HUGE)),
    ],
)
def test_what_no_manifest_or_machine_can_hold_is_a_wrong_option(command, options, paths, tmp_path):
    error = _run(command, paths, *options)
    assert isinstance(error, UsageError)
    assert str(error).startswith("not a value of ")
    assert not (tmp_path / "new").exists()


def test_a_prompt_that_is_not_utf_8_is_no_fault_of_the_tokenizer(paths):
    error = CliRunner().invoke(app, ["generate", paths["CONTAINER"], NO_TEXT]).exception
    assert isinstance(error, UsageError)
    assert str(error) == r"not a value of prompt, got '\udcff', expected text that is UTF-8"
