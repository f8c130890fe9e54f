"""Finds the files of a model: a local folder as it is, a Hub repository through the Hub's own cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from codecllm.formats.errors import HubError, UnsafeSourceError, UsageError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SIDE_PATTERNS = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY.md",
]
_SUBFOLDER_WEIGHTS = ["*/*.safetensors", "*/*.safetensors.index.json"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


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
    kind: Literal["source", "container"] = "container",
) -> ModelFiles:
    """Returns the local files of a model, downloading them where needed.

    Args:
        name_or_path: a local folder, or a Hub id (`user/name`). A folder that exists wins.
        revision: branch, tag or commit; for a Hub id only.
        token: Hub token, True for the saved one, False for none, None for the default.
        cache_dir: the Hub cache to use instead of the default one.
        kind: `source` leaves out weight files that only duplicate the safetensors; `container` takes all that it lists.

    Raises:
        UsageError: neither a folder nor a Hub id, or a revision for a folder.
        HubError: the repository could not be reached, found or read.
        UnsafeSourceError: the repository's weights are pickles only.
    """
    folder = Path(name_or_path)
    if folder.exists():
        if revision is not None:
            raise UsageError("a revision goes with a Hub id, not with a local folder", got=revision)
        return _local(folder)
    name = os.fspath(name_or_path)
    if not _REPO_ID.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError("no such folder, and not a Hub id (user/name)", file=name)
    with _one_line_errors(name, revision):
        return _download(name, revision, token, cache_dir, kind)


def _local(folder: Path) -> ModelFiles:
    """A folder inside a Hub cache knows its repository and commit by its path."""
    real = folder.resolve()
    cache_entry = real.parent.parent.name
    if real.parent.name == "snapshots" and cache_entry.startswith("models--") and _COMMIT.fullmatch(real.name):
        return ModelFiles(folder, cache_entry.removeprefix("models--").replace("--", "/"), real.name)
    return ModelFiles(folder)


def _download(repo: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None, kind: str) -> ModelFiles:
    from huggingface_hub import snapshot_download

    def fetch(weights: str, commit: str | None) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=commit or revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=[weights, *_SIDE_PATTERNS],
                ignore_patterns=_SUBFOLDER_WEIGHTS,
                library_name="codecllm",
            )
        )

    folder = fetch("model*.safetensors", None)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else None
    if kind == "source" and not any(folder.glob("*.safetensors")):
        folder = fetch("*.safetensors", commit)
        if not any(folder.glob("*.safetensors")):
            _refuse_pickles(repo, commit or revision, token)
    return ModelFiles(folder, repo, commit)


def _refuse_pickles(repo: str, revision: str | None, token: str | bool | None) -> None:
    from huggingface_hub import HfApi

    names = HfApi(library_name="codecllm").list_repo_files(repo, revision=revision, token=token)
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise UnsafeSourceError(
            "the repository's weights are pickles, which run code when they are opened", file=repo, got=pickles[0]
        )
    raise HubError("the repository holds no safetensors weights", file=repo)


@contextmanager
def _one_line_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turns the Hub client's exceptions into one HubError that says what to do."""
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    explanations: list[tuple[tuple[type[BaseException], ...], Callable[[Any], str]]] = [
        (
            (errors.GatedRepoError,),
            lambda _: "gated: ask for access on the Hub, then log in ('hf auth login' or HF_TOKEN)",
        ),
        ((errors.RepositoryNotFoundError,), lambda _: "not found on the Hub (or private: log in, or set HF_TOKEN)"),
        ((errors.RevisionNotFoundError,), lambda _: f"no such revision: {revision!r}"),
        (
            (errors.OfflineModeIsEnabled,),
            lambda _: f"not in the local cache{at}, and offline mode is on (HF_HUB_OFFLINE)",
        ),
        ((errors.LocalEntryNotFoundError,), lambda _: f"not in the local cache{at}, and the Hub cannot be reached"),
        ((errors.HFValidationError,), lambda exc: f"not a Hub id: {exc}"),
        ((errors.HfHubHTTPError,), lambda exc: f"the Hub answered with an error: {str(exc).splitlines()[0]}"),
    ]
    try:
        yield
    except (HubError, UnsafeSourceError):
        raise
    except Exception as exc:
        for classes, explain in explanations:
            if isinstance(exc, classes):
                raise HubError(explain(exc), file=repo) from exc
        if isinstance(exc, (ConnectionError, TimeoutError)) or type(exc).__module__.split(".")[0].startswith("http"):
            raise HubError(f"the Hub cannot be reached ({type(exc).__name__})", file=repo) from exc
        raise
