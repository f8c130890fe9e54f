"""A container by its name on the Hub, from a server on loopback."""

from __future__ import annotations

import pytest

from tests.hub_server import HubServer
from tests.serving.engine import IDS, running, why_not
from tests.serving.pushing import ONLINE, REPO, push

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_a_name_and_a_revision_then_offline(hub, engine, made, tmp_path):
    container, _ = made("llama", "all_int8")
    expected = engine.outputs(container, IDS)
    push(hub, container, tmp_path / "writer")
    commit = hub.repos[REPO].refs["main"]
    reader = hub.environment(token="hf_writer", cache=str(tmp_path / "reader"))
    (tmp_path / "log").mkdir()
    with running(tmp_path / "log", **reader, **ONLINE) as online:
        assert online.outputs(REPO, IDS) == expected
        assert online.outputs(REPO, IDS, revision=commit) == expected
    (tmp_path / "log2").mkdir()
    with running(tmp_path / "log2", **reader, HF_HUB_OFFLINE="1") as offline:
        assert offline.outputs(REPO, IDS) == expected
