"""A container by its name on the Hub, from a server on loopback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.hub_server import HubServer
from tests.serving.engine import IDS, ROOT, running, variables, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]
REPO = "user/tiny"
ONLINE = {"HF_HUB_OFFLINE": "0"}


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def _push(hub, folder, cache):
    done = subprocess.run(
        [sys.executable, "-m", "codecllm", "push", str(folder), REPO, "--level", "structure"],
        env=variables(cache, hub.environment(token="hf_writer", cache=str(cache)), **ONLINE),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_name_and_a_revision_then_offline(hub, engine, made, tmp_path):
    container, _ = made("llama", "all_int8")
    expected = engine.outputs(container, IDS)
    _push(hub, container, tmp_path / "writer")
    commit = hub.repos[REPO].refs["main"]
    reader = hub.environment(token="hf_writer", cache=str(tmp_path / "reader"))
    (tmp_path / "log").mkdir()
    with running(tmp_path / "log", **reader, **ONLINE) as online:
        assert online.outputs(REPO, IDS) == expected
        assert online.outputs(REPO, IDS, revision=commit) == expected
    (tmp_path / "log2").mkdir()
    with running(tmp_path / "log2", **reader, HF_HUB_OFFLINE="1") as offline:
        assert offline.outputs(REPO, IDS) == expected
