"""Files of a Hub repository as the Hub lists them: sizes and sha256, compared with a manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codecllm.formats.errors import HubError, LayoutError, TruncatedError
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
    """

    size: int
    sha256: str | None


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
                    file.size, file.lfs.sha256 if file.lfs is not None else None
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
