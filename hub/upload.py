"""Puts a container's files into a Hub repository.

Only the files that the manifest lists, the manifest itself and the model card.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from codecllm.formats import limits
from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.errors import FormatError, HubError, UsageError, one_line
from codecllm.formats.files import SafeFile, read_file
from codecllm.formats.manifest.manifest import BASELINE_NAME, INDEX_NAME, MANIFEST_NAME, Manifest
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.hub.entries import compare_contents, compare_entries, holds, read_entries
from codecllm.hub.failures import check_environment, one_line_errors
from codecllm.hub.remote import RemoteRepository
from codecllm.hub.resolve import check_repo_id, listed_names

CARD_NAME = "README.md"
CARD_BYTES = 1 << 20
"""Longest README.md that is read."""
# Files of an earlier upload that go when the new one does not bring them, also where its manifest
# cannot be read. So do weights beside them: a shard left over would be an error to readers.
_REPLACED = [INDEX_NAME, MANIFEST_NAME, BASELINE_NAME]


@dataclass(frozen=True, slots=True)
class Upload:
    """A finished upload.

    Attributes:
        url: of the repository.
        commit: the commit that holds the container.
        revision: the name that leads to it: a branch, or `refs/pr/N`.
        pull_request: URL of the pull request, or None.
        card: whether README.md was sent and is there; False where the repository has one that a
            person wrote.
        card_is_lost: whether it was sent, and the Hub has none or another.
    """

    url: str
    commit: str
    revision: str
    pull_request: str | None
    card: bool
    card_is_lost: bool


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that a container was made from, as the Hub knows it.

    Attributes:
        repo: its repository.
        card: the fields of its card that a derived card repeats: license, license_name,
            license_link, language, pipeline_tag.
        gated: whether access to it must be asked for.
    """

    repo: str
    card: dict[str, Any]
    gated: bool


def read_base_model(repo: str, *, token: str | bool | None = None) -> BaseModel:
    """Asks the Hub for a model's licence and access conditions.

    Raises:
        UsageError: not a Hub id.
        HubError: it cannot be reached or found.
    """
    check_repo_id(repo)
    check_arguments(token=token)
    check_environment()
    from huggingface_hub import HfApi

    with one_line_errors(repo):
        info = HfApi(library_name="codecllm", token=token).model_info(repo)
    data = {}
    if info.card_data is not None:
        data = info.card_data.to_dict()  # type: ignore[no-untyped-call]
    names = ("license", "license_name", "license_link", "language")
    # Whoever wrote the base's card may have put anything there.
    card = {name: data[name] for name in names if _are_texts(name, data.get(name))}
    if isinstance(info.pipeline_tag, str) and info.pipeline_tag:
        card["pipeline_tag"] = info.pipeline_tag
    return BaseModel(repo, card, bool(info.gated))


def _are_texts(field: str, value: Any) -> bool:
    """Whether a field of a card has a value of its kind: some have one text, others a list too."""
    if isinstance(value, list) and field in ("license", "language"):
        return bool(value) and all(isinstance(one, str) for one in value)
    return isinstance(value, str) and bool(value)


def check_login(repo: str, *, token: str | bool | None = None) -> None:
    """Checks the name of a repository and the token, before long work begins.

    Raises:
        UsageError: not `user/name`.
        HubError: there is no token, the Hub does not know it, or cannot be reached.
    """
    check_repo_id(repo)
    check_arguments(token=token)
    check_environment()
    from huggingface_hub import HfApi

    if "/" not in repo:
        raise UsageError("a repository needs its owner: user/name", got=repo)
    with one_line_errors(repo):
        HfApi(library_name="codecllm", token=token).whoami()


def upload_container(
    folder: Path,
    manifest: Manifest,
    manifest_sha256: str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str,
    card_marker: str,
    token: str | bool | None = None,
) -> Upload:
    """Makes the repository where there is none and uploads a container into it.

    An upload that was interrupted goes on when it is started again: files that had arrived are not
    sent a second time. The files on the Hub are compared with the manifest in the end.

    Args:
        folder: the container.
        manifest: its manifest, verified.
        manifest_sha256: sha256 of the manifest's bytes.
        repo: `user/name`.
        private: the repository must be private: a new one is made so, one that exists must be so
            already.
        revision: branch to commit to, made from `main` where it does not exist; None: `main`.
        create_pr: open a pull request against `main`.
        message: the commit's first line.
        card_marker: text that marks a README.md as made by codecllm: such a one does not replace
            one on the Hub that lacks it.
        token: Hub token.

    Raises:
        UsageError: the repository exists and is public, though `private` is asked for; nothing was
            uploaded.
        HubError: the Hub cannot be reached, or refuses.
        UnsafePathError: a file is a link or no regular file. Nothing was sent.
        LimitError: README.md is longer than `CARD_BYTES`. Nothing was sent.
        FormatError: the files on the Hub, or in the folder by now, differ from the manifest.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="codecllm", token=token)
    names = [MANIFEST_NAME, *listed_names(manifest)]
    for name in names:
        # huggingface_hub follows links, and what they lead to may be a secret.
        SafeFile(folder, name).close()
    card = is_own_card(folder, card_marker)
    with one_line_errors(repo, revision):
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        # `exist_ok` takes an existing repository as it is, public or not.
        if private and not api.model_info(repo).private:
            raise UsageError(
                "the repository exists and is public: --private cannot hide it", file=repo
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        remote = RemoteRepository(repo, revision=revision, token=token)
        card = card or not _has_own_card(remote, card_marker)
        # What `is_own_card` has looked at.
        card_bytes = read_file(folder, CARD_NAME, CARD_BYTES) if card else None
        names += [CARD_NAME] if card else []
        weights = [
            name
            for name in api.list_repo_files(repo, revision=revision)
            if name.endswith(".safetensors") and "/" not in name
        ]
        former_names = [name for name in _former_names(remote) if name != CARD_NAME]
        replaced = [escape(name) for name in (*_REPLACED, *weights, *former_names)]
        commit = _upload(api, folder, names, replaced, repo, revision, create_pr, message)
        pull_request = commit.pr_url if create_pr else None
        upload_revision = str(commit.pr_revision) if pull_request else revision or "main"
        digests = {record.name: record.sha256 for record in (*manifest.shards, *manifest.files)}
        digests[MANIFEST_NAME] = manifest_sha256
        entries = read_entries(api, repo, [*digests, CARD_NAME], upload_revision)
        compare_entries(manifest, entries)
        compare_contents(folder, digests, entries)
    is_lost = card_bytes is not None and not holds(entries.get(CARD_NAME), card_bytes)
    return Upload(
        url, str(commit.oid), upload_revision, pull_request, card and not is_lost, is_lost
    )


def is_own_card(folder: Path, marker: str) -> bool:
    """Whether a folder has a README.md that a person wrote: one without codecllm's marker.

    Raises:
        UnsafePathError: it is a link or no regular file.
        LimitError: it is longer than `CARD_BYTES`.
    """
    if not os.path.lexists(folder / CARD_NAME):
        return False
    return marker.encode() not in read_file(folder, CARD_NAME, CARD_BYTES)


def _former_names(remote: RemoteRepository) -> list[str]:
    """Returns the names of the files that the repository's present manifest lists."""
    entry = remote.entries([MANIFEST_NAME]).get(MANIFEST_NAME)
    if entry is None or entry.size > limits.MANIFEST_BYTES:
        return []
    try:
        return listed_names(parse_manifest(remote.read(MANIFEST_NAME, 0, entry.size)))
    except FormatError:  # to push again is the way to mend a damaged repository
        return []


def _has_own_card(remote: RemoteRepository, marker: str) -> bool:
    entry = remote.entries([CARD_NAME]).get(CARD_NAME)
    if entry is None or not entry.size:
        return False
    return marker.encode() not in remote.read(CARD_NAME, 0, min(entry.size, CARD_BYTES))


def _upload(
    api: Any,
    folder: Path,
    names: list[str],
    replaced: list[str],
    repo: str,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # remarks on the card's metadata
            return api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=message,
                allow_patterns=[escape(name) for name in names],
                delete_patterns=replaced,
            )
    except ValueError as exc:
        if isinstance(
            exc, OSError
        ):  # an answer of the Hub that is also a ValueError: `one_line_errors` knows it
            raise
        raise HubError(f"the Hub refuses the upload: {one_line(exc, 1000)}", file=repo) from exc
