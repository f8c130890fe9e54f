"""Sizes that the Hub lists, compared with the manifest before a byte of the files is fetched."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple

import pytest

from codecllm.formats.errors import HubError, LayoutError, TruncatedError
from codecllm.hub import resolve
from codecllm.hub.entries import read_entries
from codecllm.loader import from_pretrained
from codecllm.publishing import push
from tests.hub_endpoints import Handler

REPO = "user/tiny"
SHARD = r"\.safetensors"


@pytest.fixture
def published(hub, container):
    push(container, REPO, level="structure")
    hub.log.clear()
    return hub


@pytest.fixture
def listed(published, monkeypatch):
    """Changes the list of files by a function of its entries."""
    original = Handler._send

    def set_change(change):
        def send(self, status, data, headers=None):
            if "/paths-info/" in self.path and status == 200:
                data = json.dumps(change(json.loads(data))).encode()
                headers = {**(headers or {}), "Content-Length": str(len(data))}
            original(self, status, data, headers)

        monkeypatch.setattr(Handler, "_send", send)

    return set_change


def _fetched(hub):
    return hub.exchanges("GET", f"(resolve|cdn).*{SHARD}")


@pytest.mark.parametrize("size", [0, 1, 10**18])
@pytest.mark.parametrize("read", [resolve, from_pretrained])
def test_another_size_is_an_error_before_bytes_are_fetched(published, listed, read, size):
    listed(lambda entries: [{**entry, "size": size} for entry in entries])
    with pytest.raises(LayoutError, match=f"another size, got {size}, expected") as caught:
        read(REPO)
    assert caught.value.file.endswith(".safetensors")
    assert _fetched(published) == []


def test_a_file_that_is_not_listed_is_an_error_before_bytes_are_fetched(published, listed):
    listed(lambda entries: [one for one in entries if not re.search("00002", one["path"])])
    with pytest.raises(TruncatedError, match="missing on the Hub"):
        resolve(REPO)
    assert _fetched(published) == []


def test_a_disk_without_room_is_an_error_before_bytes_are_fetched(published, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 60_000, 60_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(HubError, match="no room for the container's files, got 60000 bytes"):
        resolve(REPO)
    assert _fetched(published) == []


def test_what_is_in_the_cache_is_not_asked_for(published, monkeypatch):
    resolve(REPO)
    assert len(published.exchanges("POST", "paths-info")) == 1
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    resolve(REPO)
    assert len(published.exchanges("POST", "paths-info")) == 1


@pytest.mark.parametrize(("name", "most"), [("codecllm.json", 64 << 20), ("config.json", 16 << 20)])
def test_a_manifest_or_config_beyond_its_limit_is_not_fetched(published, monkeypatch, name, most):
    original = Handler._send

    def send(self, status, data, headers=None):
        if self.path.endswith(name) and self.command == "HEAD":
            headers = {**headers, "Content-Length": str(most + 1)}
        original(self, status, data, headers)

    monkeypatch.setattr(Handler, "_send", send)
    with pytest.raises(HubError, match=f"{name} is too long, got {most + 1}"):
        resolve(REPO)
    assert published.exchanges("GET", name) == []


def test_long_lists_are_asked_for_in_parts():
    """Five hundred names a request: a body of a hundred thousand would be refused."""
    asked = []

    class Api:
        def get_paths_info(self, repo, names, revision):
            asked.append(len(names))
            return []

    assert read_entries(Api(), REPO, [f"{n}" for n in range(1001)], "main") == {}
    assert asked == [500, 500, 1]
