"""Files of a Hub repository as the Hub lists them: sizes and sha256, compared with a manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codecllm.formats import limits
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.errors import ChecksumError, HubError, LayoutError, TruncatedError
from codecllm.formats.files import read_file
from codecllm.formats.manifest.manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NAMES_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class RemoteEntry:
    """A file as the Hub knows it.

    Attributes:
        size: its size in bytes.
        sha256: of its content, where the Hub keeps it as a large file; else None.
        git_id: of its content where git keeps it, which is what git calls an object id.
    """

    size: int
    sha256: str | None
    git_id: str


def read_entries(api: HfApi, repo: str, names: list[str], revision: str) -> dict[str, RemoteEntry]:
    """Returns the entries of those of the named files that the repository has.

    Raises:
        HubError: an entry has no size.
        Exception: of the client, as it is.
    """
    from huggingface_hub.hf_api import RepoFile

    entries = {}
    for first in range(0, len(names), _NAMES_AT_ONCE):
        for file in api.get_paths_info(
            repo, names[first : first + _NAMES_AT_ONCE], revision=revision
        ):
            if isinstance(file, RepoFile):
                if type(file.size) is not int or file.size < 0:
                    raise HubError("the Hub names no size", file=file.path, got=ascii(file.size))
                entries[file.path] = RemoteEntry(
                    file.size,
                    file.lfs.sha256 if file.lfs is not None else None,
                    str(file.blob_id),
                )
    return entries


def compare_entries(manifest: Manifest, entries: dict[str, RemoteEntry]) -> int:
    """Compares the Hub's entries of files with the manifest.

    Returns:
        The number of files whose sha256 the Hub knows, and which is the manifest's.

    Raises:
        TruncatedError: a listed file is missing.
        LayoutError: one has another size, or content.
    """
    known_digests = 0
    for record in (*manifest.shards, *manifest.files):
        entry = entries.get(record.name)
        if entry is None:
            raise TruncatedError("file is missing on the Hub", file=record.name)
        if entry.size != record.bytes:
            raise LayoutError(
                "file on the Hub has another size",
                file=record.name,
                got=entry.size,
                expected=record.bytes,
            )
        if entry.sha256 not in (None, record.sha256):
            raise LayoutError(
                "file on the Hub differs from the manifest: sha256",
                file=record.name,
                got=entry.sha256,
                expected=record.sha256,
            )
        known_digests += entry.sha256 is not None
    return known_digests


def compare_contents(
    folder: Path, digests: Mapping[str, str], entries: Mapping[str, RemoteEntry]
) -> None:
    """Compares the contents on the Hub with those that were to be uploaded.

    Of a large file the Hub knows the sha256. Of others it knows git's id, which is made here from
    the file in the folder, whose sha256 is compared before.

    Args:
        folder: the files that were uploaded.
        digests: name -> sha256 that the content must have.
        entries: of the Hub, by name.

    Raises:
        TruncatedError: the Hub lacks a file.
        LayoutError: it has another content.
        ChecksumError: a file in the folder has changed.
        FormatError: one is no regular file any more.
    """
    for name, sha256 in digests.items():
        entry = entries.get(name)
        if entry is None:
            raise TruncatedError("file is missing on the Hub", file=name)
        got, expected = entry.sha256, sha256
        if got is None:
            data = read_file(folder, name, limits.SIDE_FILE_BYTES)
            if sha256_hex(data) != sha256:
                raise ChecksumError(
                    "file changed while it was uploaded: sha256",
                    file=name,
                    got=sha256_hex(data),
                    expected=sha256,
                )
            got, expected = entry.git_id, _git_id(data)
        if got != expected:
            raise LayoutError(
                "file on the Hub is not the one that was uploaded",
                file=name,
                got=got,
                expected=expected,
            )


def holds(entry: RemoteEntry | None, data: bytes) -> bool:
    """Whether a file on the Hub is there and has this content."""
    if entry is None:
        return False
    return sha256_hex(data) == entry.sha256 if entry.sha256 else _git_id(data) == entry.git_id


def _git_id(data: bytes) -> str:
    head = b"blob %d\0" % len(data)
    return hashlib.sha1(head + data, usedforsecurity=False).hexdigest()
