"""Interrupted transfers: cut connections, killed processes; the next run resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from huggingface_hub import constants, file_download

import codecllm
from codecllm.formats.errors import HubError
from codecllm.publishing import push
from tests.hub.conftest import variables
from tests.hub.test_push import names_in, tree

REPO = "user/tiny"
CUT = "model-00003-of-00006.safetensors"


def start(hub, cache, *arguments):
    """Starts the command line and returns the process."""
    command = [sys.executable, "-m", "codecllm", *map(str, arguments)]
    return subprocess.Popen(
        command, env=variables(hub, cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill_when(process, fault):
    """Waits until the transfer has come to the fault, then kills the process as a crash would."""
    assert fault.reached.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    fault.release.set()
    assert process.returncode == -signal.SIGKILL


def test_a_download_whose_connection_breaks_goes_on_inside_the_file(hub, container, monkeypatch):
    push(container, REPO, level="structure")
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1000
    )  # what is kept is whole blocks of this size; usually 10 MB
    fault = hub.fault(rf"GET /cdn/\w+/{CUT}", after=5000)
    report = codecllm.verify(REPO, level="checksums")
    assert report.ok
    assert fault.times == 0
    first, second = hub.exchanges("GET", rf"/cdn/\w+/{CUT}")
    size = hub.entry(REPO, CUT).size
    assert (first.sent, first.range) == (5000, None)
    assert (second.sent, second.range) == (size - 5000, "bytes=5000-")


def test_a_download_that_never_gets_through_is_one_line(hub, container, monkeypatch):
    push(container, REPO, level="structure")
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    fault = hub.fault(rf"GET /cdn/\w+/{CUT}", after=0, times=99)
    with pytest.raises(HubError, match="the connection broke") as caught:
        codecllm.verify(REPO, level="checksums")
    assert "\n" not in str(caught.value)
    assert 99 - fault.times == 6  # five more attempts
    fault.times = 0
    assert codecllm.verify(REPO, level="checksums").ok


def test_a_killed_download_fetches_only_what_is_missing(hub, container, run, tmp_path):
    push(container, REPO, level="structure")
    fault = hub.fault(rf"GET /cdn/\w+/{CUT}", after=5000, stall=True)
    kill_when(start(hub, tmp_path / "cache", "verify", REPO, "--level", "checksums"), fault)
    complete = {path.name for path in (tmp_path / "cache").glob("hub/models--*/snapshots/*/*")}
    assert CUT not in complete
    assert "codecllm.json" in complete
    hub.log.clear()
    done = run("verify", REPO, "--level", "checksums")
    assert done.returncode == 0, done.stderr
    again = {
        exchange.path.rpartition("/")[2]
        for exchange in hub.log
        if exchange.method == "GET" and "/cdn/" in exchange.path
    }
    assert CUT in again
    assert not again & complete


def test_an_upload_whose_connection_breaks_is_repeated(hub, container):
    fault = hub.fault("PUT /lfs/", after=3000)
    push(container, REPO, level="structure")
    assert fault.times == 0
    assert sorted(exchange.status for exchange in hub.exchanges("PUT", "/lfs/"))[0] == 0
    assert codecllm.verify(REPO, baseline=False).ok


def test_a_killed_upload_sends_only_what_is_missing(hub, container, run, tmp_path):
    shards = sorted(container.glob("*.safetensors"))
    sha256 = {
        record["name"]: record["sha256"] for record in codecllm.info.describe(container)["shards"]
    }
    fault = hub.fault(f"PUT /lfs/{sha256[CUT]}", after=3000, stall=True)
    process = start(hub, tmp_path / "cache", "push", container, REPO, "--level", "structure")
    assert fault.reached.wait(60)
    others = {digest for name, digest in sha256.items() if name != CUT}
    for _ in range(
        600
    ):  # five uploads run beside each other: the others arrive while this one stands still
        if others <= hub.blobs.keys():
            break
        fault.release.wait(0.05)
    kill_when(process, fault)
    assert tree(hub, REPO) == set()
    arrived = {digest for digest in sha256.values() if digest in hub.blobs}
    assert arrived == others
    hub.log.clear()
    done = run("push", container, REPO, "--level", "structure")
    assert done.returncode == 0, done.stderr
    assert [exchange.path for exchange in hub.exchanges("PUT", "/lfs/")] == [f"/lfs/{sha256[CUT]}"]
    assert len(shards) == 6
    assert tree(hub, REPO) == names_in(container) | {"README.md"}
    assert codecllm.verify(REPO, baseline=False).ok


def test_large_files_go_up_in_parts(hub, container):
    hub.part_bytes = 8000
    push(container, REPO, level="structure")
    parts = hub.exchanges("PUT", r"/lfs/\w+/\d+")
    assert len(parts) > 6
    assert max(exchange.received for exchange in parts) == 8000
    assert codecllm.verify(REPO, baseline=False).ok


def test_a_part_that_breaks_is_repeated_alone(hub, container):
    hub.part_bytes = 8000
    fault = hub.fault(r"PUT /lfs/\w+/2", after=100)
    push(container, REPO, level="structure")
    assert fault.times == 0
    failed = [exchange for exchange in hub.exchanges("PUT", r"/lfs/\w+/2") if exchange.status == 0]
    assert len(failed) == 1
    assert len(hub.exchanges("PUT", failed[0].path.removesuffix("/2") + "/1")) == 1
    assert codecllm.verify(REPO, baseline=False).ok


def test_a_commit_that_is_refused_leaves_the_branch_as_it_was(hub, container, lossless):
    push(container, REPO, level="structure")
    before = hub.repos[REPO].refs["main"]
    hub.fault(rf"POST /api/models/{REPO}/commit", after=10, times=9)
    with pytest.raises(HubError, match="connection broke"):
        push(lossless, REPO, level="structure")
    assert hub.repos[REPO].refs["main"] == before
    assert codecllm.verify(REPO, baseline=False).ok
