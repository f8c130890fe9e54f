"""A report, a plot and a signature replace no device, no input, and no file of a container."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from codecllm.cli import checking  # noqa: F401  (it adds the commands)
from codecllm.cli.app import app
from codecllm.formats.errors import UsageError
from codecllm.verifier.diagnosis.report.html_report import write_html
from codecllm.verifier.report import Report
from codecllm.verifier.signature import sign


@pytest.fixture
def place(tmp_path):
    """A folder that looks like a container, a plain model, a text, and what is no file."""
    for name in ("out", "model"):
        (tmp_path / name).mkdir()
    for name in ("out/codecllm.json", "model/config.json", "model/kl.svg", "text", "key.pem"):
        (tmp_path / name).write_text("precious")
    os.mkfifo(tmp_path / "pipe.svg")
    (tmp_path / "device.svg").symlink_to("/dev/null")
    return tmp_path


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


def test_links_that_lead_to_themselves_and_the_root_folder(place):
    (place / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        sign(place / "out", place / "key.pem", place / "loop")
    with pytest.raises(UsageError, match="in a folder that exists"):
        sign(place / "out", place / "key.pem", place / "loop" / "x")
    with pytest.raises(UsageError, match="no place beside"):
        sign("/", place / "key.pem")
