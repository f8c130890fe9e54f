"""A Hub of odd headers, endless, packed and silent answers: one error, soon, in every call."""

from __future__ import annotations

import gzip
import json
import os
import re
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from functools import cache

import pytest
from huggingface_hub import constants, file_download, get_session
from huggingface_hub.utils import _http

from codecllm.formats.errors import CodecLLMError, HubError, UnsupportedEnvironmentError
from codecllm.hub import bounds, check_login, open_remote, read_base_model, resolve
from codecllm.loader import from_pretrained
from codecllm.publishing import push
from tests import hub_endpoints
from tests.hub_endpoints import Handler
from tests.malformed.measure import measured

REPO, PLAIN, PICKLES = "user/tiny", "user/plain", "user/pickles"
READING = {
    "load": lambda folder: from_pretrained(REPO),
    "pull": lambda folder: resolve(REPO),
    "manifest": lambda folder: resolve(REPO, kind="manifest"),
    "source": lambda folder: resolve(PLAIN, kind="source"),
    "pickles": lambda folder: resolve(PICKLES, kind="source"),
    "info": lambda folder: open_remote(REPO),
    "card": lambda folder: read_base_model(REPO),
}
SENDING = {
    "login": lambda folder: check_login(REPO),
    "push": lambda folder: push(folder, REPO, level="structure"),
    "branch": lambda folder: push(folder, "user/new", level="structure", revision="v1"),
}
OPERATIONS = READING | SENDING
HEADERS = (
    *("ETag", "X-Linked-Etag", "X-Repo-Commit"),
    *("X-Linked-Size", "Content-Encoding", "Location"),
)
VALUES = (
    *(None, "", '""', 'W/""', ".", '".."', "../../../../escaped", '"a/../../../escaped"', "\xff"),
    *("x" * 300, "/escaped", "-1", "1" * 30, "1.5", "zstd", "gzip", "http://127.0.0.1:9/x"),
)  # fmt: skip


@pytest.fixture
def published(hub, container, tmp_path):
    """A container, a plain model and a repository of pickles on the Hub."""
    push(container, REPO, level="structure")
    source = {"config.json": b"{}", "model.safetensors": b"weights" * 100, "a/b.json": b"{}"}
    hub.add_repo(PLAIN, source)
    hub.add_repo(PICKLES, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    return hub


@pytest.fixture
def outcome(published, container, tmp_path):
    """Runs an operation; returns its error's text, or None. Nothing may appear beside the cache."""
    before = {path.name for path in tmp_path.iterdir()} | {"cache"}

    def run(operation):
        try:
            OPERATIONS[operation](container)
        except CodecLLMError as exc:
            text = str(exc)
            assert len(text) < 1000 and "\n" not in text
            return text
        finally:
            assert {path.name for path in tmp_path.iterdir()} <= before
            assert not list(tmp_path.rglob("*escaped*"))
        return None

    return run


@pytest.fixture
def no_pauses(monkeypatch):
    """Lets the client repeat a question at once."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def _change(monkeypatch, change):
    """Has `change` make status, body and headers of each answer."""
    original = Handler._send

    def send(self, status, data, headers=None):
        status, data, headers = change(self, status, data, dict(headers or {}))
        original(self, status, data, headers)

    monkeypatch.setattr(Handler, "_send", send)


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("operation", READING)
def test_odd_headers_of_a_file(outcome, no_pauses, monkeypatch, tmp_path, header, operation):
    texts = []
    for number, value in enumerate(VALUES):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / str(number)))

        def odd(handler, status, data, headers, value=value):
            if re.search("/resolve/|/cdn/", handler.path):
                headers.pop(header, None)
                headers |= {} if value is None else {header: value}
            return status, data, headers

        with monkeypatch.context() as patch:
            _change(patch, odd)
            texts.append(outcome(operation))
    if header == "ETag" and operation == "pull":
        named = [text for text in texts if text and "the Hub's ETag is none" in text]
        assert len(named) >= 8
        assert all(text.startswith(f"{REPO}: ") and ".json" in text for text in named)


@pytest.mark.parametrize("oid", ["", "..", "../../../../escaped", "/escaped", "\0", "x" * 300])
def test_odd_names_of_content_in_lists(outcome, monkeypatch, oid):
    def odd(handler, status, data, headers):
        if "/tree/" in handler.path or "/paths-info/" in handler.path:
            entries = json.loads(data)
            entries[-1]["oid"] = oid
            entries[-1]["lfs"] = {"oid": oid, "size": 1, "pointerSize": 134}
            data = json.dumps(entries).encode()
            headers |= {"Content-Length": str(len(data))}
        return status, data, headers

    _change(monkeypatch, odd)
    for operation in ("load", "pull", "source", "info", "push"):
        text = outcome(operation)
        assert text is not None and "oid is none" in text


@pytest.mark.parametrize(
    "path", ["", "..", "/escaped", "../escaped", "a\0b", "c" * 300, "config.json/x"]
)
def test_odd_names_of_files(outcome, monkeypatch, path):
    def odd(handler, status, data, headers):
        if "/tree/" in handler.path:
            data = json.dumps([*json.loads(data), {**json.loads(data)[0], "path": path}]).encode()
            headers |= {"Content-Length": str(len(data))}
        return status, data, headers

    _change(monkeypatch, odd)
    for operation in ("pull", "source", "pickles"):
        outcome(operation)


@cache
def _bomb(encoding):
    blank = b" " * (200 << 20)
    return gzip.compress(blank) if encoding == "gzip" else zlib.compress(blank)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "gzip, gzip"])
@pytest.mark.parametrize("pattern", ["/api/", "/resolve/|/cdn/"])
def test_answers_that_unpack_to_gigabytes(outcome, no_pauses, monkeypatch, pattern, encoding):
    bomb = _bomb(encoding.lower() if encoding == "GZIP" else encoding)

    def packed(handler, status, data, headers):
        if status in (200, 206) and re.search(pattern, handler.path) and handler.command != "HEAD":
            return status, bomb, {**headers, "Content-Encoding": encoding}
        return status, data, headers

    _change(monkeypatch, packed)
    for operation in READING:
        with measured() as cost:
            text = outcome(operation)
        assert cost.mib < 96, operation
        if operation == "card" and pattern.startswith("/resolve"):
            assert text is None  # it reads no file
        elif operation != "pickles":
            assert text is not None, operation
            # A part of a manifest is read as far as it should go, and is then none.
            assert re.search("too long|wrong encoding|Consistency|codecllm.json", text)


def test_a_packed_answer_is_unpacked(outcome, monkeypatch):
    def packed(handler, status, data, headers):
        if status == 200 and "gzip" in handler.headers.get("Accept-Encoding", ""):
            data = gzip.compress(data)
            headers |= {"Content-Encoding": "gzip", "Content-Length": str(len(data))}
        return status, data, headers

    _change(monkeypatch, packed)
    for operation in OPERATIONS.keys() - {"pickles"}:
        assert outcome(operation) is None


def test_lists_without_an_end(outcome, monkeypatch):
    monkeypatch.setattr(bounds, "MOST_ANSWERS", 50)

    def endless(handler, status, data, headers):
        if "/tree/" in handler.path:
            headers["Link"] = f'<{handler.hub.url}{handler.path}>; rel="next"'
        return status, data, headers

    _change(monkeypatch, endless)
    for operation in ("pull", "source", "pickles"):
        assert "have no end" in outcome(operation)


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "1000000000"}, {"ratelimit": '"api";r=0;t=99999'}, {"Retry-After": "9" * 50}],
    ids=str,
)
def test_a_hub_that_asks_to_wait_for_days(outcome, monkeypatch, headers):
    _change(monkeypatch, lambda handler, status, data, old: (429, b"", {**old, **headers}))
    for operation in OPERATIONS:
        assert "asks to wait too long" in outcome(operation)


@contextmanager
def _short_times(monkeypatch):
    """Makes each limit of time a fifth of a second, and pauses between requests nothing."""
    for place, name in (
        (constants, "HF_HUB_DOWNLOAD_TIMEOUT"),
        (constants, "HF_HUB_ETAG_TIMEOUT"),
        (file_download, "_ETAG_RETRY_TIMEOUT"),
        (bounds, "SEND_SECONDS"),
    ):
        monkeypatch.setattr(place, name, 0.2)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 60


SILENT = {
    "info": READING.keys() | {"push"},
    "tree": {"load", "pull", "manifest", "source", "pickles"},
    "paths_info": {"info", "push", "branch"},
    "resolve": {"load", "pull", "manifest", "source", "info"},
    "cdn": {"load", "pull", "source", "info"},
    "whoami": SENDING.keys(),
    "create": {"push", "branch"},
    "branch": {"branch"},
    "preupload": {"push", "branch"},
    "lfs_batch": {"branch"},
    "commit": {"branch"},
}


@pytest.mark.parametrize("endpoint", SILENT)
def test_a_hub_that_falls_silent(outcome, container, monkeypatch, endpoint):
    """It takes the request, and says nothing."""
    done = threading.Event()
    routes = [
        (method, pattern, _silent(done) if action.__name__ == endpoint else action)
        for method, pattern, action in hub_endpoints._ROUTES
    ]
    monkeypatch.setattr(hub_endpoints, "_ROUTES", routes)
    try:
        with _short_times(monkeypatch):
            for operation in SILENT[endpoint]:
                text = outcome(operation)
                assert text is not None, operation
                assert re.search("cannot be reached|Consistency|incomplete|refuses", text), text
    finally:
        done.set()


def _silent(done):
    return lambda handler, **_: done.wait(90)


def test_every_request_of_ours_is_bounded(published, container, monkeypatch):
    """A request outside a block of `one_line_errors` would have neither limit nor typed error."""
    seen = []
    client = type(get_session())
    send = client.send

    def watched(self, request, **options):
        seen.append((bounds._shared.calls > 0, str(request.url)))
        return send(self, request, **options)

    monkeypatch.setattr(client, "send", watched)
    for operation in OPERATIONS.values():
        with suppress(CodecLLMError):  # of a repository without a model
            operation(container)
    assert len(seen) > 40
    assert [url for is_bounded, url in seen if not is_bounded] == []


def test_nothing_stays_changed(published, container):
    hooks = {kind: list(hooks) for kind, hooks in get_session().event_hooks.items()}
    factory, client = _http._GLOBAL_CLIENT_FACTORY, get_session()
    with bounds.bounded(), bounds.bounded():
        assert len(get_session().event_hooks["response"]) == len(hooks["response"]) + 1
        assert _http._GLOBAL_CLIENT_FACTORY is not factory
        _http.close_session()
        assert get_session() is not client  # as behind an error of the connection
        assert len(get_session().event_hooks["response"]) == len(hooks["response"]) + 1
    assert (_http._GLOBAL_CLIENT_FACTORY, get_session().event_hooks) == (factory, hooks)
    with pytest.raises(HubError):
        resolve("user/absent")
    assert (_http._GLOBAL_CLIENT_FACTORY, get_session().event_hooks) == (factory, hooks)


@pytest.mark.parametrize("name", ["_GLOBAL_CLIENT", "_GLOBAL_CLIENT_FACTORY"])
def test_a_client_in_another_place_is_an_error(published, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.delattr(_http, name)
        with pytest.raises(UnsupportedEnvironmentError, match=r"another place, got .* 2\.4"):
            resolve(REPO)


def test_a_factory_that_is_set_meanwhile_stays():
    factory = _http._GLOBAL_CLIENT_FACTORY
    try:
        with bounds.bounded():
            _http.set_client_factory(own := lambda: factory())
        assert _http._GLOBAL_CLIENT_FACTORY is own
    finally:
        _http.set_client_factory(factory)


def test_a_fork_inside_a_call_begins_anew():
    factory = _http._GLOBAL_CLIENT_FACTORY
    with bounds.bounded(), bounds._shared.lock:
        child = os.fork()
        if child == 0:
            fine = _http._GLOBAL_CLIENT_FACTORY is factory and bounds._shared.calls == 0
            with bounds.bounded():
                os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
