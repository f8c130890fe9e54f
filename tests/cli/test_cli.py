"""The command line: help, output, JSON, exit codes, and signals that leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from codecllm.cli.options import parse_size
from codecllm.formats.errors import UsageError
from tests import tampering
from tests.cli.forks import run

COMMANDS = (
    "convert",
    "push",
    "verify",
    "compare",
    "eval",
    "info",
    "export",
    "generate",
    "bench",
    "doctor",
    "sign",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    tensors = {
        f"layer.{i}.weight": rng.standard_normal((512, 512)).astype(np.float32) for i in range(4)
    }
    save_file({**tensors, "norm": np.ones(512, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    return folder


@pytest.fixture(scope="module")
def container(tmp_path_factory, source):
    out = tmp_path_factory.mktemp("out") / "c"
    done = run("convert", source, out, "--no-baseline")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def run_here(monkeypatch):
    """Runs the command line in this process, with its signals and environment; returns the code."""
    import huggingface_hub  # noqa: F401  # it reads the environment when it is imported

    from codecllm import cli

    def run_here(*arguments):
        monkeypatch.setattr(sys, "argv", ["codecllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code

    monkeypatch.setenv(
        "HF_HUB_DISABLE_PROGRESS_BARS", "1"
    )  # or main would set it for all tests that follow
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # main sets its own
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run_here
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout
    assert len(done.stdout.splitlines()) > 10


@pytest.mark.parametrize(("command", "extra"), [("eval", "plot"), ("sign", "sign")])
def test_help_names_the_extra_that_a_command_needs(command, extra):
    assert f"codecllm[{extra}]" in run(command, "--help").stdout


def test_root_help_lists_the_commands_and_exit_codes():
    done = run("--help")
    assert all(command in done.stdout for command in COMMANDS)
    assert "Exit codes" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "codecllm", "--version"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"codecllm \d+\.\d+\.\d+, container format 1\.3\n", done.stdout)


def test_codec_rans(container, source, tmp_path):
    done = run("convert", source, tmp_path / "c", "--no-baseline", "--codec", "rans", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["codec"] == "rans"
    info, other = (
        json.loads(run("info", folder, "--json").stdout) for folder in (tmp_path / "c", container)
    )
    assert (info["codec"], other["codec"]) == ("rans", "zstd")
    assert info["container_bytes"] < other["container_bytes"]
    assert {row["codec"] for row in info["tensors"]} == {"rans", None}
    assert run("verify", tmp_path / "c", "--source", source, "--no-baseline").returncode == 0
    predicted = json.loads(
        run("convert", source, tmp_path / "d", "--codec", "rans", "--dry-run", "--json").stdout
    )
    assert abs(predicted["stored_bytes"] / info["container_bytes"] - 1) < 0.01


def test_convert_verify_info_export(container, source, tmp_path):
    done = run("verify", container, "--source", source, "--no-baseline")
    assert done.returncode == 0
    assert "source     ok" in done.stdout
    info = json.loads(run("info", container, "--json").stdout)
    assert {row["scheme"] for row in info["tensors"]} == {"int8", "raw"}
    assert "layer.0.weight" in run("info", container).stdout
    done = run("export", container, tmp_path / "plain", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["tensor_bytes"] == 4 * 512 * 512 * 4 + 512 * 4
    assert (tmp_path / "plain" / "config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_diagnose_and_compare(container, source, tmp_path):
    """The model of these tests cannot be built: stages that need no model still give findings."""
    page = tmp_path / "page.html"
    done = run("verify", container, "--source", source, "--diagnose", "--report", page)
    assert "round trip ok      4 of 4 int8 tensors" in done.stdout, done.stderr
    assert "loaded     FAILED" in done.stdout
    assert done.returncode == 1
    assert "layer.3.weight" in page.read_text()
    report = json.loads(run("verify", container, "--source", source, "--diagnose", "--json").stdout)
    assert report["conclusion"].startswith("Model does not load")
    assert run("verify", container, "--diagnose").returncode == 2
    assert run("compare", container, container, "--no-run").returncode == 0
    done = run("compare", source, container, "--no-run", "--json")
    assert done.returncode == 1
    found = {row["name"]: row for row in json.loads(done.stdout)["tensors"]}
    assert found["norm"]["same"]
    assert 0 < found["layer.0.weight"]["relative_error"] < 0.02
    assert "4 of 5 tensors differ" in run("compare", source, container, "--no-run").stdout


def test_convert_says_what_it_took_and_what_it_left(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    for name in ("modeling_own.py", *(f"optimizer{number}.pt" for number in range(8))):
        (folder / name).write_text("x")
    done = run("convert", folder, tmp_path / "c", "--no-baseline")
    assert "took model.safetensors: 5 tensors" in done.stdout
    assert "left modeling_own.py: code" in done.stdout
    assert "optimizer5.pt and 2 more (--json names all): pickle" in done.stdout
    for more in (["--dry-run"], ["--force", "--no-baseline"]):
        done = run("convert", folder, tmp_path / "c", "--with-code", "--json", *more)
        facts = json.loads(done.stdout)
        assert facts["taken"] == "model.safetensors: 5 tensors"
        assert {one["reason"] for one in facts["left"]} == {"pickle"}
        assert len(facts["left"]) == 8
    assert (tmp_path / "c" / "modeling_own.py").exists()


def test_convert_json_and_existing_output(source, tmp_path):
    done = run("convert", source, tmp_path / "c", "--no-baseline", "--json")
    report = json.loads(done.stdout)
    assert report["ratio"] > 3
    assert len(report["manifest_sha256"]) == 64
    again = run("convert", source, tmp_path / "c", "--no-baseline")
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert run("convert", source, tmp_path / "c", "--no-baseline", "--force").returncode == 0
    pinned = run(
        "verify",
        tmp_path / "c",
        "--level",
        "structure",
        "--manifest-sha256",
        report["manifest_sha256"],
    )
    assert pinned.returncode == 0


def test_dry_run_writes_nothing_and_predicts(source, container, tmp_path):
    done = run("convert", source, tmp_path / "c", "--dry-run", "--json")
    predicted = json.loads(done.stdout)["stored_bytes"]
    real = (
        sum(path.stat().st_size for path in container.glob("*.safetensors"))
        + (container / "codecllm.json").stat().st_size
    )
    assert abs(predicted - real) < 0.03 * real
    assert not (tmp_path / "c").exists()
    assert "layer.0.weight" in run("convert", source, tmp_path / "c", "--dry-run").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["convert", "/no/such/model", "out"], 2, "no such folder"),
        (["convert", "SOURCE/config.json", "out"], 1, "a model is a folder"),
        (["convert", "SOURCE", "out", "--max-shard-size", "many"], 2, "not a size"),
        (["convert", "SOURCE", "out", "--scheme", "int3"], 2, "int3"),
        (["verify", "SOURCE"], 1, "codecllm.json"),
        (["verify", "SOURCE/config.json"], 1, "the folder with codecllm.json"),
        (["info", "SOURCE"], 1, "codecllm.json"),
        (["info", "/no/such/container"], 2, "no such folder"),
        (["export", "SOURCE", "out"], 1, "codecllm.json"),
        (["generate", "SOURCE", "Hello"], 1, "codecllm.json"),
        (["compare", "SOURCE", "/no/such/model"], 2, "no such folder"),
        (["verify", "SOURCE", "--report", "page.html"], 2, "--diagnose"),
        (["verify", "SOURCE", "--resident", "int8"], 2, "--diagnose"),
        (
            ["verify", "SOURCE", "--diagnose", "--report", "absent/page.html"],
            2,
            "folder that exists",
        ),
        (["verify", "SOURCE", "--diagnose", "--no-baseline"], 2, "--diagnose"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(source, tmp_path, arguments, code, words):
    done = run(*[word.replace("SOURCE", str(source)) for word in arguments], cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        ({"format_version": "7.0"}, 3),
        ({"required_features": ["time-travel"]}, 3),
        ({"files": [{"name": "../x", "bytes": 1, "sha256": "0" * 64}]}, 5),
    ],
)
def test_exit_codes_of_refused_containers(container, tmp_path, edit, code):
    folder = tampering.copy_of(container, tmp_path / "c")
    tampering.reseal(folder, lambda document: document.update(edit))
    for command in (["info", folder], ["verify", folder], ["generate", folder, "Hello"]):
        done = run(*command)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_unsafe_source_has_exit_code_5(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    done = run("convert", tmp_path / "source", tmp_path / "out")
    assert done.returncode == 5
    assert not (tmp_path / "out").exists()


def test_json_errors_and_debug(source, tmp_path):
    done = run("info", source, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "NotAContainerError"
    assert "Traceback" in run("--debug", "info", source).stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_behind(tmp_path, number, code):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    block = np.random.default_rng(0).standard_normal((2048, 4096)).astype(np.float32)
    save_file({f"layer.{i}.weight": block + i for i in range(16)}, source / "model.safetensors")
    command = [
        sys.executable,
        "-m",
        "codecllm",
        "convert",
        str(source),
        str(out),
        "--no-baseline",
        "--scheme",
        "lossless",
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    staging = out / ".codecllm-partial"
    while not any(staging.rglob("*.safetensors")) and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == code, stderr
    assert "Traceback" not in stderr
    assert not out.exists()


def test_a_signal_inside_a_lock_is_still_that_signal(container, run_here, monkeypatch, capsys):
    """A signal in a condition's wait makes the exit of the lock fail with a RuntimeError."""
    from codecllm.cli import process

    def interrupted(*args, **kwargs):
        try:
            raise process._StopError(signal.SIGTERM)
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr("codecllm.info.describe", interrupted)
    assert run_here("info", container) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 GiB") == 3 << 29
    assert parse_size("1000") == 1000
    for text in ("", "GB", "-1MB", "0", "nan", "5XB"):
        with pytest.raises(UsageError):
            parse_size(text)


def test_unlisted_shard_is_an_error_for_people(container, tmp_path):
    folder = tampering.copy_of(container, tmp_path / "c")
    Path(folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    done = run("verify", folder, "--level", "structure")
    assert done.returncode == 1
    assert "structure  FAILED" in done.stdout
    assert "model-00002-of-00002.safetensors" in done.stdout


def test_what_nobody_foresaw_is_one_line_too(container, run_here, monkeypatch, capsys):
    def surprise(*args, **kwargs):
        raise ZeroDivisionError("surprise\nof two lines")

    monkeypatch.setattr("codecllm.info.describe", surprise)
    assert run_here("info", container) == 6  # 1 would be a verdict on the container
    assert "unexpected ZeroDivisionError: surprise of two lines" in capsys.readouterr().err


def test_a_device_without_memory_is_a_fault_of_the_machine(
    container, run_here, monkeypatch, capsys
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("codecllm.info.describe", full)
    assert run_here("info", container) == 4
    text = capsys.readouterr().err
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" in text
    assert "unexpected" not in text


def _with_closed(streams, *arguments):
    shell = f'exec "$@" {streams}'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "codecllm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_a_closed_stdout_is_one_error(container):
    done = _with_closed(">&-", "info", container)
    assert done.returncode == 4
    assert done.stderr == "error: stdout is closed: there is no place for the result\n"
    assert _with_closed(">&- 2>&-", "info", container).returncode == 4


def test_closed_stdin_and_stderr_change_nothing(container, tmp_path):
    arguments = ("info", container, "--json")
    done = _with_closed("<&- 2>&-", *arguments)
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads(run(*arguments).stdout)
    done = _with_closed("2>&-", "info", tmp_path / "absent")
    assert (done.returncode, done.stdout) == (run("info", tmp_path / "absent").returncode, "")


@pytest.mark.parametrize("command", [("info",), ("verify", "--level", "structure")])
def test_a_bound_of_expansion_that_is_no_number_is_a_usage_error(
    container, run_here, monkeypatch, capsys, command
):
    for text in ("abc", "nan", "", "-1", "inf"):
        monkeypatch.setenv("CODECLLM_MAX_EXPANSION", text)
        assert run_here(command[0], container, *command[1:]) == 2
        written = capsys.readouterr()
        assert "CODECLLM_MAX_EXPANSION is not a number" in written.out + written.err


@pytest.mark.parametrize("command", [["verify", "--level", "structure"], ["info"]])
def test_a_result_that_does_not_fit_on_the_disk_is_one_line(tmp_path, command):
    save_file({"a.weight": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    assert run("convert", tmp_path, tmp_path / "out", "--no-baseline").returncode == 0
    name, *options = command
    with open("/dev/full", "w") as disk:
        full = subprocess.run(
            [sys.executable, "-m", "codecllm", name, str(tmp_path / "out"), "--json", *options],
            stdout=disk, stderr=subprocess.PIPE, text=True, check=False, timeout=240,
        )  # fmt: skip
    assert full.returncode == 4
    assert full.stderr.splitlines() == ["error: OSError: [Errno 28] No space left on device"]
