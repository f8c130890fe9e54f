"""A report, a plot and a signature replace no device, no input, and no file of a container."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from codecllm.cli import checking  # noqa: F401  (it adds the commands)
from codecllm.cli.app import app
from codecllm.formats.arguments.outputs import check_output
from codecllm.formats.errors import UsageError
from codecllm.verifier.diagnosis.report.html_report import write_html
from codecllm.verifier.report import Report
from codecllm.verifier.signature import sign


@pytest.fixture
def place(tmp_path):
    """A folder that looks like a container, a plain model, a text, and what is no file."""
    for name in ("out/sub", "model", "results"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("out/codecllm.json", "model/config.json", "model/kl.svg", "text", "key.pem"):
        (tmp_path / name).write_text("precious")
    os.mkfifo(tmp_path / "pipe.svg")
    (tmp_path / "device.svg").symlink_to("/dev/null")
    (tmp_path / "results/out.svg").symlink_to(tmp_path / "out")
    return tmp_path


REFUSED = {
    "absent/a.svg": "in a folder that exists",
    "results": "no regular file",
    "pipe.svg": "no regular file",
    "device.svg": "no regular file",
    "out/codecllm.json": "outside of containers",
    "out/new.svg": "outside of containers",
    "out/sub/new.svg": "outside of containers",
    "results/out.svg/new.svg": "outside of containers",
    "model/config.json": "replace what is read",
    "model/../model/kl.svg": "replace what is read",
    "text": "replace what is read",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_output_would_end_is_refused(place, name):
    inputs = (place / "out", str(place / "model"), place / "text", None, "user/name", "a\0")
    with pytest.raises(UsageError, match=f"^{place}.*the report.*{REFUSED[name]}"):
        check_output(place / name, "the report", inputs)


def test_a_hard_link_to_an_input_is_that_input(place):
    os.link(place / "key.pem", place / "key.sig")
    with pytest.raises(UsageError, match="replace what is read"):
        check_output(place / "key.sig", "signature", (place / "key.pem",))


def test_new_files_earlier_results_and_links_to_files_pass(place):
    (place / "results/link").symlink_to(place / "text")
    (place / "results/dangling").symlink_to(place / "absent")
    (place / "results/old").write_text("an earlier result")
    for name in ("results/link", "results/dangling", "results/old", "results/new", "model/new"):
        check_output(place / name, "report", (place / "model", place / "key.pem"))


COMMANDS = {
    "--report": ["verify", "out", "--diagnose", "--source", "model"],
    "--plot": ["eval", "model", "out", "--text", "text"],
    "--signature": ["sign", "out", "--private-key", "key.pem"],
}
ENDED = {
    "--report": ("out/codecllm.json", "out/new.html", "pipe.svg", "model/config.json"),
    "--plot": ("out/new.svg", "pipe.svg", "device.svg", "model/kl.svg"),
    "--signature": ("out/new.sig", "key.pem", "pipe.svg", "device.svg"),
}


@pytest.mark.parametrize("option", COMMANDS)
def test_commands_refuse_before_the_work(place, monkeypatch, option):
    """The models are none: any work would end in another error."""
    monkeypatch.chdir(place)
    for name in ENDED[option]:
        before = os.lstat(place / name) if os.path.lexists(place / name) else None
        result = CliRunner().invoke(app, [*COMMANDS[option], option, name])
        assert isinstance(result.exception, UsageError), (name, result.exception)
        assert os.path.lexists(place / name) == (before is not None)
        assert before is None or os.path.samestat(before, os.lstat(place / name))


def test_functions_refuse_too(place):
    with pytest.raises(UsageError, match="outside of containers"):
        write_html(Report(str(place / "out"), "full"), place / "out/codecllm.json")
    with pytest.raises(UsageError, match="replace what is read"):
        sign(place / "out", place / "key.pem", place / "key.pem")
    for name in ("out/codecllm.json", "key.pem"):
        assert (place / name).read_text() == "precious"
