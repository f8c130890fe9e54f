"""`push`: a verified container, with its model card, into a Hub repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from codecllm.formats.arguments.check import check_arguments, choice
from codecllm.formats.container import CONTAINER_IS, Container
from codecllm.formats.errors import HubError, NotAContainerError, UsageError
from codecllm.formats.files import as_path, describe_missing, write_atomically
from codecllm.hub import BaseModel, Upload, check_login, read_base_model, upload_container
from codecllm.hub.upload import CARD_NAME, is_own_card
from codecllm.model_card import MARKER, make_card
from codecllm.verifier import verify
from codecllm.verifier.checks.integrity import Progress
from codecllm.verifier.verification import Level

# Licences that let anyone publish changed copies and ask for no more than a notice.
_FREE_LICENCES = frozenset(
    {
        "apache-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc-by-4.0",
        "cc0-1.0",
        "isc",
        "mit",
        "mit-0",
        "unlicense",
    }
)


@dataclass(frozen=True, slots=True)
class PushReport:
    """The result of a push.

    Attributes:
        repo: `user/name`.
        upload: where it is now.
        manifest_sha256: the value to pin.
        files: number of files sent or already there, the manifest and the card included.
        container_bytes: of shards and manifest.
        card: whether the model card is codecllm's; False where the container or the repository has
            one of the user's own.
        warnings: sentences for the user.
    """

    repo: str
    upload: Upload
    manifest_sha256: str
    files: int
    container_bytes: int
    card: bool
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {
            "repo": self.repo,
            "url": self.upload.url,
            "commit": self.upload.commit,
            "revision": self.upload.revision,
            "pull_request": self.upload.pull_request,
            "manifest_sha256": self.manifest_sha256,
            "files": self.files,
            "container_bytes": self.container_bytes,
            "card": self.card,
            "warnings": self.warnings,
        }


def push(
    container: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    level: Level = "full",
    token: str | bool | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> PushReport:
    """Verifies a container, writes its model card and uploads both; see `hub.upload_container`.

    Args:
        container: a local folder.
        repo: `user/name`; made where it does not exist.
        private: make it private, and stop where it exists and is public.
        revision: branch to commit to; made from `main` where it does not exist.
        create_pr: open a pull request against `main`.
        message: the commit's first line.
        base_model: Hub id of the model it was made from, where the manifest does not say.
        level: how far to verify before anything is sent.
        token: Hub token; None takes HF_TOKEN or the saved one.
        workers: threads of the verification.
        progress: called by the verification with a name, bytes done and bytes in all.
        on_stage: called with a sentence when a stage begins.

    Raises:
        UsageError: the arguments contradict each other, or a public repository is in the way of a
            private one.
        CodecLLMError: the container does not verify: the class of its first fault. Nothing was
            sent.
        UnsafePathError, LimitError: README.md is no regular file of the folder, or is too long.
            Nothing was sent.
        HubError: the Hub cannot be reached, or refuses.
    """
    folder = as_path(container, "container")
    check_arguments(
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        base_model=base_model,
        token=token,
        workers=workers,
        progress=progress,
        on_stage=on_stage,
    )
    choice(get_args(Level))(level, "level")
    tell = on_stage or (lambda text: None)
    if create_pr and revision is not None:
        raise UsageError(
            "a pull request is made against main: revision and create_pr exclude each other",
            got=revision,
        )
    if not folder.is_dir():
        raise NotAContainerError(describe_missing(folder, CONTAINER_IS), file=str(container))
    # First: verifying a large container takes minutes.
    check_login(repo, token=token)
    tell(f"verifying {folder} (level {level})")
    sha256 = _verified(folder, level, workers, progress)
    # Exactly the manifest that was verified: the folder may have changed since.
    with Container(folder, expected_manifest_sha256=sha256) as opened_container:
        manifest = opened_container.manifest
        base, warnings = _ask_base(base_model or manifest.source.repo, private, token)
        card = _write_card(opened_container, repo, base)
        if not card:
            warnings.append(f"{CARD_NAME} is not one that codecllm wrote: it is published as it is")
        tell(f"uploading to {repo}")
        upload = upload_container(
            folder,
            manifest,
            sha256,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message or f"Upload a codecllm container ({manifest.options.scheme})",
            card_marker=MARKER,
            token=token,
        )
        if upload.card_is_lost:
            warnings.append(
                f"{CARD_NAME} was sent, and the Hub has none or another: does a .gitignore of the "
                "repository name it?"
            )
        elif not upload.card:
            warnings.append(
                f"{CARD_NAME} on the Hub is not one that codecllm wrote: it stays as it is"
            )
        files = len(manifest.shards) + len(manifest.files) + 1 + upload.card
        return PushReport(
            repo,
            upload,
            sha256,
            files,
            opened_container.stored_bytes,
            card and upload.card,
            warnings,
        )


def _verified(folder: Path, level: Level, workers: int | None, progress: Progress | None) -> str:
    """Returns the sha256 of a manifest that holds; raises the first fault otherwise."""
    report = verify(folder, level=level, workers=workers, progress=progress)
    faults = [finding.error for stage in report.stages for finding in stage.findings]
    if faults:
        count = len(faults)
        faults[
            0
        ].message = (
            f"not pushed, {count} fault{'s' * (count != 1)} found; the first: {faults[0].message}"
        )
        # The class of the first fault gives the exit code.
        raise faults[0]
    assert report.manifest_sha256 is not None
    return report.manifest_sha256


def _ask_base(
    repo: str | None, private: bool, token: str | bool | None
) -> tuple[BaseModel | None, list[str]]:
    """Returns the base model as the Hub knows it, and warnings for the publisher."""
    if repo is None:
        return None, [
            "the source was a local folder: the card names no base model and no licence "
            "(--base-model names it)"
        ]
    try:
        base = read_base_model(repo, token=token)
    except HubError as exc:
        # A base model that is gone or private must not stop a push.
        return None, [
            f"the card states no licence, because the base model could not be looked up: {exc}"
        ]
    warnings = []
    if base.gated and not private:
        warnings.append(
            f"{repo} is gated, and gating does not travel: everyone can read a public copy "
            "(--private hides it)"
        )
    licence = base.card.get("license")
    if licence is None:
        warnings.append(
            f"{repo} states no licence: without one its weights may not be published by others"
        )
    elif str(licence) not in _FREE_LICENCES:
        name = base.card.get("license_name") or licence
        warnings.append(
            f"the licence of {repo} ({name}) binds its copies too: read it before you publish"
        )
    return base, warnings


def _write_card(container: Container, repo: str, base: BaseModel | None) -> bool:
    """Writes README.md unless the user has written one; returns whether it did."""
    if is_own_card(container.folder, MARKER):
        return False
    write_atomically(container.folder / CARD_NAME, make_card(container, repo, base).encode())
    return True
