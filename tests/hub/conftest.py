"""A local Hub, containers to put there, and the command line as a process that talks to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from codecllm.converter import convert
from tests.hub_server import HubServer
from tests.integration import tiny_models
from tests.tampering import copy_of

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A server, and this process's huggingface_hub turned to it: `user`'s token, an empty cache."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, value in server.environment(token="hf_writer").items():
            monkeypatch.setenv(name, value)
        yield server
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def _containers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    source = tiny_models.llama(folder / "source")
    made = {}
    for scheme, shard_bytes in (("int8", 20_000), ("lossless", 10_000_000)):
        made[scheme] = folder / scheme
        include = ("*",) if scheme == "int8" else ()
        convert(source, made[scheme], scheme=scheme, include=include, max_shard_bytes=shard_bytes)
    return made


@pytest.fixture
def container(_containers: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny Llama as an int8 container of several shards; a copy that a test may change."""
    return copy_of(_containers["int8"], tmp_path / "int8")


@pytest.fixture
def lossless(_containers: dict[str, Path], tmp_path: Path) -> Path:
    """The same model as a lossless container of one shard."""
    return copy_of(_containers["lossless"], tmp_path / "lossless")


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    """Runs the command line as a process; `environment` sets variables or (None) removes them."""

    def call(
        *arguments: Any,
        token: str | None = "hf_writer",
        cache: str = "cache",
        **environment: str | None,
    ) -> Any:
        return subprocess.run(
            [sys.executable, "-m", "codecllm", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            env=variables(hub, tmp_path / cache, token, **environment),
            cwd=tmp_path,
        )

    return call


def variables(
    hub: HubServer, cache: Path, token: str | None = "hf_writer", **more: str | None
) -> dict[str, str]:
    """Returns the environment of a process that talks to `hub`."""
    base = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    merged = {**base, **hub.environment(token=token, cache=str(cache)), **more}
    return {name: value for name, value in merged.items() if value is not None}
