"""A file to write replaces no device, no input, and no file of a container."""

from __future__ import annotations

import os

import pytest

from codecllm.formats.arguments.outputs import check_output
from codecllm.formats.errors import UsageError


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
