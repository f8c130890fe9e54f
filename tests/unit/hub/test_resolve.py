"""Names of models: folders, cache entries and Hub ids resolve, or fail in one line."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import errors

from codecllm.formats.errors import HubError, UnsafeSourceError, UsageError
from codecllm.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path):
    folder = tmp_path / "models--user--name" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def test_local_folder_is_itself(tmp_path):
    files = resolve(tmp_path)
    assert (files.folder, files.repo, files.commit) == (tmp_path, None, None)


def test_folder_in_the_hub_cache_knows_repository_and_commit(snapshot):
    files = resolve(snapshot)
    assert (files.repo, files.commit) == ("user/name", COMMIT)


def test_revision_of_a_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="revision"):
        resolve(tmp_path, revision="main")


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "a/b/c", "user/..", "user/a--b", "white space/x"]
)
def test_neither_folder_nor_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="not a Hub id"):
        resolve(name)


def test_hub_id_is_downloaded_and_pinned_to_its_commit(snapshot, monkeypatch):
    calls = []

    def download(repo, **options):
        calls.append((repo, options))
        return str(snapshot)

    (snapshot / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = resolve("user/name", revision="main", token="secret", cache_dir="/cache", kind="source")
    assert (files.folder, files.repo, files.commit) == (snapshot, "user/name", COMMIT)
    repo, options = calls[0]
    assert (repo, options["revision"], options["token"], options["cache_dir"]) == (
        "user/name",
        "main",
        "secret",
        "/cache",
    )
    assert not any(
        pattern.endswith((".py", ".bin", ".pkl", ".pt")) for pattern in options["allow_patterns"]
    )


def test_repository_of_pickles_is_refused(snapshot, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(snapshot))
    monkeypatch.setattr(
        huggingface_hub,
        "list_repo_files",
        lambda *args, **kwargs: ["pytorch_model.bin", "config.json"],
        raising=False,
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *args, **kwargs: ["pytorch_model.bin"]
    )
    with pytest.raises((UnsafeSourceError, HubError)) as caught:
        resolve("user/name", kind="source")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("x"), "not in the local cache"),
        (errors.OfflineModeIsEnabled("x"), "offline mode"),
        (ConnectionError("no route"), "cannot be reached"),
    ],
)
def test_failures_are_one_line(monkeypatch, error, words):
    def fail(repo, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError, match=words) as caught:
        resolve("user/name")
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
