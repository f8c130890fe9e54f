"""Answers that no Hub gives: each is one HubError, or changes nothing."""

from __future__ import annotations

import json
import re
import socket

import pytest
from huggingface_hub import constants

from codecllm.formats.errors import CodecLLMError, HubError
from codecllm.hub import resolve
from codecllm.hub.failures import one_line_errors
from codecllm.hub.remote import RemoteRepository, open_remote
from codecllm.hub.source_files import fetch_source
from codecllm.loader import from_pretrained
from codecllm.publishing import push
from tests.hub_endpoints import Handler

REPO = "user/tiny"
ANSWERS = [
    b"", b"[]", b"{}", b"[{}]", b"null", b"5", b'"text"', b"<html>", b"\xff", b"[" * 100_000,
    b'{"id":"user/tiny"}', b'{"id":"user/tiny","sha":5,"siblings":5}',
    b'{"id":"user/tiny","sha":"../..","siblings":[]}',
    b'[{"type":"file"}]', b'[{"type":"file","path":"codecllm.json","oid":"x","size":1,"lfs":5}]',
]  # fmt: skip
SIZES = [None, "1", -1, 1.5, [], True]


@pytest.fixture
def answer(hub, container, monkeypatch):
    """Makes the Hub answer requests whose path matches with bytes of the test's choice."""
    push(container, REPO, level="structure")
    original = Handler._send

    def set_answer(pattern, data):
        def send(self, status, body, headers=None):
            is_meant = status == 200 and re.search(pattern, self.path) and self.command != "HEAD"
            original(self, status, data if is_meant else body, headers)

        monkeypatch.setattr(Handler, "_send", send)

    return set_answer


@pytest.mark.parametrize("data", ANSWERS)
@pytest.mark.parametrize("endpoint", ["/revision/|models/user/tiny$", "/paths-info/", "/tree/"])
def test_an_answer_that_is_not_understood_is_one_error(answer, endpoint, data):
    answer(endpoint, data)
    outcomes = []
    for read in (from_pretrained, open_remote, lambda name: resolve(name, kind="source")):
        try:
            read(REPO)
        except CodecLLMError as exc:  # with an empty list of files it is none of a container
            outcomes.append(str(exc))
    assert all(len(text) < 1000 and "\n" not in text for text in outcomes)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff" * 900])
def test_a_file_of_another_length_is_an_error(answer, data):
    answer("/resolve/.*/config.json", data)
    with pytest.raises(HubError, match=r"Consistency check failed|answer is too long"):
        from_pretrained(REPO)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_is_none_is_an_error(answer, size):
    entry = {"type": "file", "path": "codecllm.json", "oid": "0" * 40, "size": size}
    answer("/paths-info/", json.dumps([entry]).encode())
    with pytest.raises(HubError, match="names no size"):
        open_remote(REPO)


def test_a_commit_that_is_none_is_an_error(answer):
    answer("models/user/tiny", b'{"id":"user/tiny","sha":"../..","siblings":[]}')
    with pytest.raises(HubError, match="names no commit"):
        RemoteRepository(REPO)


def test_a_reason_of_the_hub_is_shortened(hub, monkeypatch):
    def refuse(self, repo, rev="main"):
        self._send(418, b"", {"X-Error-Message": "m" * 5000})

    monkeypatch.setattr(Handler, "repo_to_read", refuse)
    with pytest.raises(HubError) as caught:
        RemoteRepository(REPO)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("answered", [False, True])
def test_a_hub_that_falls_silent_is_an_error(hub, monkeypatch, answered):
    """It takes the connection, answers the question for the commit at most, and says no more."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.add_repo(REPO, {"codecllm.json": b"{}"})
    repository = RemoteRepository(REPO) if answered else None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(HubError, match="cannot be reached"):
            repository.read("codecllm.json", 0, 2) if repository else RemoteRepository(REPO)


@pytest.mark.parametrize("error", [KeyError("ours"), MemoryError(), OSError(28, "full")])
def test_errors_of_other_code_pass(error):
    with pytest.raises(type(error)), one_line_errors(REPO):
        raise error


def _asked_for(folder, data, name):
    (folder / name).write_bytes(data)
    asked = []

    def fetch(wanted, unwanted):
        asked.extend(wanted)
        return folder

    fetch_source(fetch)
    return asked


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b"[" + b"[]," * 2_000_000 + b"[]]"),
        ("modules.json", json.dumps([{"path": "\0"}, {"path": "a" * 300}]).encode()),
        ("modules.json", json.dumps([{"path": f"{n}"} for n in range(20_000)]).encode()),
        ("router_config.json", json.dumps({"types": {f"{n}": 1 for n in range(20_000)}}).encode()),
    ],
)
def test_a_file_of_a_source_names_no_end_of_files(tmp_path, name, data):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert len(_asked_for(tmp_path, data, name)) < 600
