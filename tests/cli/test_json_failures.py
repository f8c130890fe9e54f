"""Every command with `--json`, with every kind of failure: one object on stdout, nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from codecllm.cli import app as app_module
from codecllm.converter import convert
from tests.cli.forked import ERRORS, SIGNALS
from tests.integration import tiny_models
from tests.tampering import copy_of

# Arguments with which each command begins its work, and the function that does it.
COMMANDS = {
    "convert": (["SOURCE", "OUT"], "codecllm.api.run_conversion"),
    "convert --dry-run": (["SOURCE", "OUT"], "codecllm.api.predict"),
    "export": (["CONTAINER", "OUT"], "codecllm.api.export"),
    "push": (["CONTAINER", "user/name"], "codecllm.publishing.push"),
    "verify": (["CONTAINER"], "codecllm.verifier.verify"),
    "verify --diagnose": (["CONTAINER"], "codecllm.verifier.diagnosis.diagnose"),
    "sign": (["CONTAINER", "--private-key", "KEY"], "codecllm.verifier.signature.sign"),
    "compare": (["CONTAINER", "SOURCE"], "codecllm.verifier.model_comparison.compare_models"),
    "eval": (["SOURCE", "CONTAINER"], "codecllm.verifier.evaluation.evaluate"),
    "doctor": ([], "codecllm.doctor.examine"),
    "info": (["CONTAINER"], "codecllm.info.describe_name"),
    "generate": (["CONTAINER", "w1"], "codecllm.generation.generate"),
    "bench": (["CONTAINER"], "codecllm.bench.bench"),
}
RANGES = {
    "convert": ["--bits", "99"], "export": ["--width", "99"], "push": ["--level", "deep"],
    "verify": ["--resident", "dense"], "compare": ["--workers", "0"],
    "eval": ["--dtype", "int8"], "info": ["--revision"], "generate": ["--max-new-tokens", "x"],
    "bench": ["--device", "nowhere"],
}  # fmt: skip
NOWHERE = {"SOURCE": "ABSENT", "CONTAINER": "ABSENT"}
"""What takes the place of an argument, so that it leads to nothing."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    base = tmp_path_factory.mktemp("json")
    source = tiny_models.llama(base / "source")
    convert(source, base / "container", scheme="lossless")
    damaged = copy_of(base / "container", base / "damaged")
    manifest = bytearray((damaged / "codecllm.json").read_bytes())
    manifest[100] ^= 1
    (damaged / "codecllm.json").write_bytes(manifest)
    (base / "[red]text").mkdir()
    names = {"SOURCE": source, "CONTAINER": base / "container", "DAMAGED": damaged}
    more = {"OUT": base / "out", "KEY": base / "no key", "ABSENT": base / "absent"}
    return {name: str(path) for name, path in (names | more | {"TEXT": base / "[red]text"}).items()}


def _cases(places):
    """Yields the name of each case, and the case."""

    def line(command, arguments, *more):
        return [*command.split(), *(places.get(one, one) for one in arguments), *more, "--json"]

    for command, (arguments, worker) in COMMANDS.items():
        for error in (*ERRORS, *SIGNALS):
            case = {"arguments": line(command, arguments), "patch": worker, "error": error}
            yield f"{command}: {error}", case
        yield f"{command}: unknown option", {"arguments": line(command, arguments, "--never")}
        yield (
            f"{command}: too many arguments",
            {"arguments": line(command, arguments, "x", "y", "z")},
        )
        if command in RANGES:
            yield f"{command}: range", {"arguments": line(command, arguments, *RANGES[command])}
        if arguments:
            yield f"{command}: nothing", {"arguments": [*command.split(), "--json"]}
            for place in ("ABSENT", "DAMAGED", "TEXT"):
                broken = [place, *arguments[1:]]
                yield f"{command}: {place}", {"arguments": line(command, broken)}
    yield "no such command", {"arguments": ["never", "--json"]}
    yield "no command", {"arguments": ["--json"]}


def _outcomes(places, begin):
    """Returns what each case whose name begins so has printed, by the rest of its name."""
    cases = {
        name.removeprefix(begin): case for name, case in _cases(places) if name.startswith(begin)
    }
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_ENDPOINT": "http://127.0.0.1:9"}
    # A fork of a process with threads may wait for a lock that nobody holds any more.
    variables |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.forked"],
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=variables,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def _object(done):
    """Returns the one object of a failure."""
    facts = json.loads(done["stdout"])
    assert isinstance(facts, dict)
    assert "noise" not in done["stdout"]
    return facts


@pytest.mark.parametrize("command", COMMANDS)
def test_every_failure_is_one_object_on_stdout(places, command):
    own = _outcomes(places, f"{command}: ")
    assert len(own) >= 13
    for name, done in own.items():
        facts = _object(done)
        if "verify" in command and name in ("DAMAGED", "TEXT"):
            assert (facts["ok"], done["code"]) == (False, 1)  # a report is the result
            continue
        assert done["code"] == facts["exit_code"] != 0, name
        assert facts["error"] and facts["message"], name
        assert "[bold red]" not in facts["message"]
        if name in SIGNALS:
            assert done["code"] == 128 + signal.Signals[name]
            assert facts["error"] == "Interrupted"
            assert name in facts["message"]
        if name in ("MemoryError", "OSError"):
            assert (facts["error"], done["code"]) == (name, 4)
        wrong = {"unknown option", "too many arguments", "nothing", "range"}
        if name in wrong and (command, name) != ("eval", "too many arguments"):
            assert (facts["error"], done["code"]) == ("UsageError", 2), name
        assert "Traceback" not in done["stderr"]


def test_every_command_is_in_the_table():
    import codecllm.cli.checking
    import codecllm.cli.converting
    import codecllm.cli.reading  # noqa: F401

    names = {one.name or one.callback.__name__ for one in app_module.app.registered_commands}
    assert names == {command.split()[0] for command in COMMANDS}


def test_a_line_without_a_command_is_one_too(places):
    outcomes = _outcomes(places, "no ")
    assert set(outcomes) == {"such command", "command"}
    for done in outcomes.values():
        assert _object(done)["error"] == "UsageError"
        assert done["code"] == 2


def test_ctrl_c_while_modules_are_imported(places):
    command = [sys.executable, "-X", "importtime", "-m", "codecllm", "info", places["CONTAINER"]]
    process = subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "typer" in line:  # our handler stands by now, and much is still to come
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["error"] == "Interrupted"


def test_text_behind_a_double_dash_asks_for_no_json(places):
    command = [sys.executable, "-m", "codecllm", "info", "--", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --json: no such folder")


def test_a_result_holds_numbers_of_json_only():
    script = (
        "from codecllm.cli.json_output import output\n"
        "output.print({'a': float('nan'), 'b': [float('inf'), 1.5, {'c': -float('inf')}]})\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5, {"c": None}]}
