"""Finds the files of a model: in a local folder, or of a Hub repository in the Hub's cache."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from codecllm.formats import limits
from codecllm.formats.arguments.check import check_arguments, choice, refusal
from codecllm.formats.errors import (
    HubError,
    NotAContainerError,
    UnsafeSourceError,
    UsageError,
)
from codecllm.formats.files import as_path, read_file
from codecllm.formats.manifest.manifest import (
    CODE_SUFFIX,
    INDEX_NAME,
    LOAD_REPORT_NAME,
    MANIFEST_NAME,
    Manifest,
)
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.hub.bounds import COMMIT
from codecllm.hub.entries import compare_entries, read_entries
from codecllm.hub.failures import check_environment, one_line_errors
from codecllm.hub.kinds import file_kind
from codecllm.hub.source_files import fetch_source

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_MODEL_FILES = frozenset({"config.json", "generation_config.json", LOAD_REPORT_NAME, INDEX_NAME})

Kind = Literal["source", "container", "either", "model", "manifest"]
"""The part of a repository to fetch.

`source`: a plain model to convert. Of a container, `container`: all files that it lists, `model`:
those from which a model is loaded, `manifest`: the manifest alone. `either`: as `container`, or as
`source` where the repository has no manifest.
"""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model's files are.

    Attributes:
        folder: local folder with the files.
        repo: Hub repository they came from, or None for a folder that is not in the Hub's cache.
        commit: its commit (40 hex digits), or None.
    """

    folder: Path
    repo: str | None = None
    commit: str | None = None


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    kind: Kind = "container",
) -> ModelFiles:
    """Returns the local files of a model, downloading them where needed.

    Of a container only files that its manifest lists are fetched. A download that was interrupted
    goes on where it stopped: files that are complete are not fetched again, and a connection that
    breaks is resumed inside the file.

    Args:
        name_or_path: a local folder, or a Hub id (`user/name`). A folder that exists wins.
        revision: branch, tag or commit; for a Hub id only.
        token: Hub token, True for the saved one, False for none, None for the default.
        cache_dir: the Hub cache to use instead of the default one.
        kind: the part to fetch: `source` leaves out weight files that transformers would not load,
            `container` is all that the manifest lists, `model` the shards and configs, `manifest`
            the manifest, `either` a container or a source, whichever the repository holds.

    Raises:
        UsageError: neither a folder nor a Hub id, a revision for a folder, or no path.
        HubError: the repository could not be reached, found or read, or HF_ENDPOINT is no URL.
        NotAContainerError: a container is wanted, and the repository has no manifest.
        FormatError: its manifest is not valid, or the Hub has other sizes than it; then none of its
            files was fetched.
        UnsafeSourceError: the repository's weights are pickles only.
    """
    folder = as_path(name_or_path, "model")
    check_arguments(revision=revision, token=token, cache_dir=cache_dir)
    choice(get_args(Kind))(kind, "kind")
    check_environment()  # a local model too: transformers asks huggingface_hub
    if folder.exists():
        if revision is not None:
            raise UsageError("a revision goes with a Hub id, not with a local folder", got=revision)
        return _local(folder)
    name = os.fspath(name_or_path)
    check_repo_id(name)
    with one_line_errors(name, revision):
        if kind == "source":
            return _download_source(name, revision, token, cache_dir)
        return _download_container(name, revision, token, cache_dir, kind)


def check_repo_id(name: str) -> None:
    """Raises UsageError where `name` cannot be a Hub id."""
    if not isinstance(name, str):
        raise refusal(name, "repo", "a Hub id (user/name)")
    if not _REPO_ID.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError("no such folder, and not a Hub id (user/name)", file=str(name)[:200])


def listed_names(manifest: Manifest) -> list[str]:
    """Returns the names of all files of a container but the manifest: shards, then side files."""
    return [record.name for record in (*manifest.shards, *manifest.files)]


def _local(folder: Path) -> ModelFiles:
    """A folder inside a Hub cache knows its repository and commit by its path."""
    real = folder.resolve()
    cache_entry = real.parent.parent.name
    if (
        real.parent.name == "snapshots"
        and cache_entry.startswith("models--")
        and COMMIT.fullmatch(real.name)
    ):
        return ModelFiles(
            folder, cache_entry.removeprefix("models--").replace("--", "/"), real.name
        )
    return ModelFiles(folder)


def _download_container(
    repo: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    kind: Kind,
) -> ModelFiles:
    """Fetches the manifest, and of its commit the files that the manifest lists."""
    from huggingface_hub import HfApi

    folder = _snapshot(
        repo, revision, token, cache_dir, [MANIFEST_NAME, "config.json"]
    )  # both are needed in any case
    # The cache names a snapshot's folder by its commit: the second download sees the same one.
    commit = folder.name if COMMIT.fullmatch(folder.name) else None
    if not (folder / MANIFEST_NAME).exists():
        if kind == "either":
            return _download_source(repo, commit or revision, token, cache_dir)
        raise NotAContainerError(f"the repository holds no {MANIFEST_NAME}", file=repo)
    if kind != "manifest":
        # Not by its path: others may write to a cache, and leave a pipe or a device there.
        manifest = parse_manifest(read_file(folder, MANIFEST_NAME, limits.MANIFEST_BYTES))
        names = _model_names(manifest) if kind == "model" else listed_names(manifest)
        missing = {name for name in names if not (folder / name).exists()}
        api = HfApi(library_name="codecllm", token=token)
        _check_missing(manifest, missing, repo, folder, api, commit or revision or "main")
        folder = _snapshot(
            repo, commit or revision, token, cache_dir, [MANIFEST_NAME, *map(escape, names)]
        )
    return ModelFiles(folder, repo, commit)


def _check_missing(
    manifest: Manifest, names: set[str], repo: str, folder: Path, api: HfApi, revision: str
) -> None:
    """Compares the Hub's sizes with the manifest before files are fetched, and looks for room.

    Args:
        manifest: the container's.
        names: of the files that are not in the cache.
        repo: the repository, for errors.
        folder: the snapshot in the cache.
        api: the client.
        revision: of the repository.

    Raises:
        TruncatedError: a listed file is missing on the Hub.
        LayoutError: one has another size, or content.
        HubError: the disk has no room for them.
    """
    if not names:
        return
    compare_entries(manifest, read_entries(api, repo, listed_names(manifest), revision))
    blobs = folder.parent.parent / "blobs"
    needed_bytes = sum(
        record.bytes
        for record in (*manifest.shards, *manifest.files)
        # Another commit may have the same content.
        if record.name in names and not (blobs / record.sha256).exists()
    )
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise HubError(
            "the disk has no room for the container's files",
            file=repo,
            got=f"{free} bytes",
            expected=f"{needed_bytes} bytes",
        )


def _model_names(manifest: Manifest) -> list[str]:
    return [
        name
        for name in listed_names(manifest)
        if name.endswith((".safetensors", CODE_SUFFIX)) or name in _MODEL_FILES
    ]


def _download_source(
    repo: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> ModelFiles:
    pinned_revision = revision

    def fetch(wanted: list[str], unwanted: list[str]) -> Path:
        nonlocal pinned_revision
        folder = _snapshot(repo, pinned_revision, token, cache_dir, wanted, unwanted)
        # All fetches of one conversion see the commit of the first.
        pinned_revision = folder.name if COMMIT.fullmatch(folder.name) else pinned_revision
        return folder

    folder, has_weights = fetch_source(fetch)
    if not has_weights:
        _refuse_pickles(repo, pinned_revision, token)
    return ModelFiles(folder, repo, folder.name if COMMIT.fullmatch(folder.name) else None)


def _snapshot(
    repo: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    wanted: list[str],
    unwanted: list[str] | None = None,
) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        allow_patterns=wanted,
        ignore_patterns=unwanted,
        library_name="codecllm",
    )
    return Path(folder)


def _refuse_pickles(repo: str, revision: str | None, token: str | bool | None) -> None:
    from huggingface_hub import HfApi

    names = HfApi(library_name="codecllm").list_repo_files(repo, revision=revision, token=token)
    pickles = [name for name in names if file_kind(name) == "pickle"]
    if pickles:
        raise UnsafeSourceError(
            "the repository's weights are pickles, which run code when they are opened",
            file=repo,
            got=pickles[0],
        )
    raise HubError("the repository holds no safetensors weights", file=repo)
