"""Models by Hub name: only the necessary bytes are fetched, and every byte is checked."""

from __future__ import annotations

import json
import os

import pytest
import torch

import codecllm
import codecllm.loader
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    ChecksumError,
    HubError,
    LayoutError,
    NotAContainerError,
    TruncatedError,
    UnsafePathError,
    UnsafeSourceError,
    UsageError,
)
from codecllm.hub import resolve
from codecllm.info import describe, describe_name
from codecllm.publishing import push
from codecllm.verifier.evaluation.candidates import find_candidate
from codecllm.verifier.model_comparison import compare_models
from tests import tampering
from tests.hub.test_push import assert_same_weights, names_in

REPO = "user/tiny"
TENSOR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def published(hub, container):
    """The container, pushed; the server's log begins after that."""
    push(container, REPO, level="structure")
    hub.log.clear()
    return container


def fetched(hub):
    """Names of the files of which content was sent."""
    return {
        exchange.path.partition("?")[0].rpartition("/")[2]
        for exchange in hub.log
        if exchange.method == "GET"
        and exchange.sent
        and ("/resolve/" in exchange.path or "/cdn/" in exchange.path)
    }


def test_info_reads_headers_by_ranges_and_no_weights(hub, published, tmp_path):
    facts = describe_name(REPO)
    local = describe(published)
    assert {**facts, "folder": None, "hub": None} == {**local, "folder": None, "hub": None}
    with Container(published) as opened:
        headers = [
            len(opened.shard(number)[1].raw) for number in range(len(opened.manifest.shards))
        ]
        expected = opened.manifest_bytes + sum(headers)
    assert facts["hub"]["transferred_bytes"] == expected
    content = [
        e for e in hub.log if e.method == "GET" and ("/cdn/" in e.path or "/resolve/" in e.path)
    ]
    assert sum(exchange.sent for exchange in content) == expected
    assert all(exchange.range for exchange in content)
    assert expected < facts["hub"]["listed_bytes"] / 2
    assert facts["hub"]["known_sha256"] == len(headers)
    assert not (tmp_path / "cache").exists()


def test_info_as_a_command_says_what_it_read(hub, published, run):
    done = run("info", REPO)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("read "))
    assert "no weights" in line
    sent = sum(
        e.sent
        for e in hub.log
        if e.method == "GET" and ("/cdn/" in e.path or "/resolve/" in e.path)
    )
    assert f"read       {sent:,} of " in line
    assert (
        json.loads(run("info", REPO, "--json").stdout)["hub"]["commit"]
        == hub.repos[REPO].refs["main"]
    )


def test_only_listed_files_are_fetched(hub, published):
    repo = hub.repos[REPO]
    extra = {
        name: hub.store(name, b"x" * 100)
        for name in ("pytorch_model.bin", "notes.json", "run.py", "other.safetensors")
    }
    hub.commit(repo, {**repo.commits[repo.refs["main"]], **extra}, "more", "main")
    assert codecllm.verify(REPO, baseline=False).ok
    assert fetched(hub) == names_in(published)


def test_a_model_needs_its_shards_and_configs_only(hub, published):
    codecllm.from_pretrained(REPO)
    shards = {name for name in names_in(published) if name.endswith(".safetensors")}
    configs = {"codecllm.json", "config.json", "generation_config.json"}
    assert fetched(hub) == shards | configs | {"model.safetensors.index.json"}
    sent = hub.sent()
    codecllm.from_pretrained(REPO)
    assert hub.sent() - sent < 50_000  # the listing of the repository, no file
    assert codecllm.verify(REPO, level="structure").ok


def test_verify_by_name_at_every_level(hub, published, run):
    done = run("verify", REPO, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["commit"] == hub.repos[REPO].refs["main"]
    stages = {stage["name"]: stage["verdict"] for stage in report["stages"]}
    assert stages == {
        "structure": "ok",
        "checksums": "ok",
        "decode": "ok",
        "ratio": "ok",
        "baseline": "skipped",
    }


def test_transformers_alone_loads_by_name(hub, published, tmp_path):
    from transformers import AutoModelForCausalLM

    cache = tmp_path / "elsewhere"
    model = AutoModelForCausalLM.from_pretrained(REPO, cache_dir=cache, dtype=torch.bfloat16)
    assert_same_weights(model, codecllm.from_pretrained(published))
    assert list(cache.glob("models--user--tiny/snapshots/*/codecllm.json"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_byte_changed_on_the_server_is_refused(hub, published):
    path, byte = tampering.payload_place(published, TENSOR)
    hub.tamper(REPO, path.name, byte)
    with pytest.raises(ChecksumError, match="stored bytes are damaged") as caught:
        codecllm.from_pretrained(REPO)
    assert (caught.value.file, caught.value.tensor, caught.value.chunk, caught.value.byte) == (
        path.name,
        TENSOR,
        0,
        byte,
    )
    report = codecllm.verify(REPO)
    assert not report.ok
    assert {finding.error.file for finding in report.stage("checksums").findings} == {path.name}


@pytest.mark.parametrize(
    ("name", "byte", "error"),
    [
        ("codecllm.json", 300, ChecksumError),
        ("model-00001-of-00006.safetensors", 40, ChecksumError),
        ("config.json", 5, ChecksumError),
    ],
)
def test_every_file_of_a_load_is_checked(hub, published, name, byte, error):
    hub.tamper(REPO, name, byte)
    with pytest.raises(error) as caught:
        codecllm.from_pretrained(REPO)
    assert caught.value.file == name


def test_info_compares_headers_and_sizes(hub, published):
    shard = "model-00002-of-00006.safetensors"
    hub.tamper(REPO, shard, 40)
    with pytest.raises(ChecksumError, match="header") as caught:
        describe_name(REPO)
    assert caught.value.file == shard
    repo = hub.repos[REPO]
    files = repo.commits[repo.refs["main"]]
    hub.commit(repo, {**files, shard: hub.store(shard, b"short")}, "shorter", "main")
    with pytest.raises(LayoutError, match="another size"):
        describe_name(REPO)
    hub.commit(
        repo, {name: entry for name, entry in files.items() if name != shard}, "missing", "main"
    )
    with pytest.raises(TruncatedError, match="missing on the Hub"):
        describe_name(REPO)
    with pytest.raises(TruncatedError, match="missing"):
        codecllm.from_pretrained(REPO)


def test_a_pinned_manifest_refuses_a_later_push(hub, published, lossless):
    pinned = describe_name(REPO)["manifest_sha256"]
    push(lossless, REPO, level="structure")
    with pytest.raises(ChecksumError, match="not the expected one"):
        codecllm.from_pretrained(REPO, expected_manifest_sha256=pinned)


def test_a_repository_that_is_no_container(hub):
    hub.add_repo("user/plain", {"model.safetensors": b"weights", "config.json": b"{}"})
    for action in (describe_name, codecllm.verify, codecllm.from_pretrained):
        with pytest.raises(NotAContainerError, match="holds no codecllm"):
            action("user/plain")
    assert fetched(hub) == {"config.json"}


def test_compare_and_eval_take_plain_models_and_containers_by_name(hub, published, lossless, run):
    """Of a container the listed files are fetched, whose sizes are checked; of a model its own."""
    repo = hub.repos[REPO]
    extra = {"other.safetensors": hub.store("other.safetensors", b"x" * 100)}
    hub.commit(repo, {**repo.commits[repo.refs["main"]], **extra}, "more", "main")
    plain = lossless.parent / "plain"
    codecllm.export(lossless, plain)
    hub.add_repo("user/plain", {p.name: p.read_bytes() for p in plain.iterdir()})
    hub.log.clear()
    here = compare_models(plain, published)
    there = compare_models("user/plain", REPO)
    assert {**there, "a": 0, "b": 0} == {**here, "a": 0, "b": 0} and not there["same"]
    assert compare_models("user/plain", lossless)["same"]
    assert fetched(hub) == names_in(published) | {p.name for p in plain.iterdir()}
    candidates = [find_candidate(name) for name in ("user/plain", REPO)]
    assert [candidate.kind for candidate in candidates] == ["folder", "container"]
    assert candidates[1].bits() == find_candidate(published).bits()
    assert run("compare", "user/plain", REPO, "--no-run").returncode == 1


def test_compare_refuses_a_repository_that_is_neither(hub):
    hub.add_repo("user/none", {"config.json": b"{}"})
    hub.add_repo("user/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(HubError, match="no safetensors weights"):
        compare_models("user/none", "user/none")
    with pytest.raises(UnsafeSourceError, match="pickles"):
        compare_models("user/pickle", "user/pickle")


def test_a_server_without_ranges_is_not_drained(hub, published, monkeypatch):
    from tests import hub_endpoints

    monkeypatch.setattr(
        hub_endpoints.Handler, "_file", lambda self, data, headers: self._send(200, data, headers)
    )
    with pytest.raises((HubError, UsageError), match="serves no ranges"):
        describe_name(REPO)


@pytest.mark.parametrize("kind", ["container", "model", "either"])
def test_a_manifest_in_the_cache_that_is_no_file(published, tmp_path, kind):
    """Others may write to a cache that is shared."""
    path = resolve(REPO, kind="manifest").folder / "codecllm.json"
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(tmp_path / "elsewhere"),
    ):
        path.unlink()
        (tmp_path / "elsewhere").write_text("{}")
        make(path)
        with pytest.raises(UnsafePathError):
            resolve(REPO, kind=kind)
        if path.is_dir():
            path.rmdir()
            path.touch()


def test_a_config_in_the_cache_that_is_a_pipe(hub):
    hub.add_repo("user/plain", {"config.json": b"{}", "model.safetensors": b"weights"})
    path = resolve("user/plain", kind="source").folder / "config.json"
    path.unlink()
    os.mkfifo(path)
    resolve("user/plain", kind="source")  # the conversion names the fault
