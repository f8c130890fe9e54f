"""Parts of a Hub repository's files, read by range requests.

They tell of a container without a download of its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from codecllm.formats import limits
from codecllm.formats.arguments.check import check_arguments
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.errors import (
    HubError,
    LimitError,
    NotAContainerError,
    TruncatedError,
)
from codecllm.formats.manifest.manifest import MANIFEST_NAME, Manifest
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.formats.shards.consistency import check_shard_header
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES, ShardHeader, parse_header
from codecllm.hub.bounds import COMMIT
from codecllm.hub.entries import RemoteEntry, compare_entries, read_entries
from codecllm.hub.failures import check_environment, one_line_errors
from codecllm.hub.resolve import check_repo_id, listed_names

if TYPE_CHECKING:
    pass


class RemoteRepository:
    """A Hub repository at one commit, read by range requests.

    Attributes:
        name: `user/name`.
        commit: the commit that the revision led to, 40 hex digits.
        transferred_bytes: bytes of file content received so far.
    """

    def __init__(
        self, name: str, *, revision: str | None = None, token: str | bool | None = None
    ) -> None:
        """Asks the Hub for the commit.

        Raises:
            UsageError: not a Hub id.
            HubError: the repository cannot be reached, found or read.
        """
        check_repo_id(name)
        check_arguments(revision=revision, token=token)
        check_environment()
        from huggingface_hub import HfApi, constants

        self.name = name
        self.transferred_bytes = 0
        self._token = token
        self._api = HfApi(library_name="codecllm", token=token)
        with one_line_errors(name, revision):
            found = self._api.model_info(
                name, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
        if not COMMIT.fullmatch(str(found.sha)):
            raise HubError("the Hub names no commit", file=name, got=ascii(found.sha)[:200])
        self.commit = str(found.sha)

    def entries(self, names: list[str]) -> dict[str, RemoteEntry]:
        """Returns the entries of those of the named files that the repository has.

        Raises:
            HubError: the Hub cannot be asked.
        """
        with one_line_errors(self.name):
            return read_entries(self._api, self.name, names, self.commit)

    def read(self, file: str, offset: int, length: int) -> bytes:
        """Reads exactly `length` bytes at `offset`.

        No more are transferred than the server sends ahead.

        Raises:
            HubError: the Hub cannot be asked, or does not serve ranges.
            TruncatedError: the file ends before.
        """
        if not length:
            return b""
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status

        # Documented, but not re-exported.
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers(token=self._token, library_name="codecllm")
        # identity: offsets in a compressed answer would be others.
        headers |= {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        with one_line_errors(self.name):
            url = hf_hub_url(self.name, file, revision=self.commit)
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # of each read; the client's has none
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                # From offset 0 a whole file begins with the right bytes; elsewhere they would be
                # others.
                if response.status_code != 206 and offset:
                    raise HubError(
                        "the Hub serves no ranges of this file", file=file, got=response.status_code
                    )
                for block in response.iter_raw():
                    data += block
                    self.transferred_bytes += len(block)
                    if len(data) >= length:
                        break
        if len(data) < length:
            raise TruncatedError(
                "file ends early", file=file, byte=offset + len(data), expected=offset + length
            )
        return bytes(data[:length])


@dataclass(frozen=True, slots=True)
class RemoteContainer:
    """A container on the Hub, of which the manifest and the shards' headers were read and compared.

    Attributes:
        repository: where it is.
        manifest: its manifest.
        manifest_sha256: sha256 of the manifest's bytes.
        manifest_bytes: their number.
        headers: the header of every shard, in order; each has its checksum and the tensors
            of the manifest.
        large_files: how many listed files have a sha256 on the Hub, each the one in the manifest.
    """

    repository: RemoteRepository
    manifest: Manifest
    manifest_sha256: str
    manifest_bytes: int
    headers: list[ShardHeader]
    large_files: int


def open_remote(
    name: str, *, revision: str | None = None, token: str | bool | None = None
) -> RemoteContainer:
    """Reads manifest and shard headers of a container on the Hub; no weights are transferred.

    Sizes of all listed files, and the sha256 of those that the Hub keeps as large files, are
    compared with the manifest.

    Raises:
        UsageError: not a Hub id.
        HubError: the repository cannot be reached, found or read.
        NotAContainerError: it has no manifest.
        FormatError: the manifest is not valid, or a file or header differs from it.
    """
    repository = RemoteRepository(name, revision=revision, token=token)
    entry = repository.entries([MANIFEST_NAME]).get(MANIFEST_NAME)
    if entry is None:
        raise NotAContainerError(f"the repository holds no {MANIFEST_NAME}", file=name)
    if entry.size > limits.MANIFEST_BYTES:
        raise LimitError("manifest is too long", file=MANIFEST_NAME, got=entry.size)
    data = repository.read(MANIFEST_NAME, 0, entry.size)
    manifest = parse_manifest(data)
    large_files = compare_entries(manifest, repository.entries(listed_names(manifest)))
    headers = [_read_header(repository, shard.name, shard.bytes) for shard in manifest.shards]
    for number, header in enumerate(headers):
        check_shard_header(manifest, number, header)
    return RemoteContainer(repository, manifest, sha256_hex(data), len(data), headers, large_files)


def _read_header(repository: RemoteRepository, name: str, file_bytes: int) -> ShardHeader:
    prefix = repository.read(name, 0, PREFIX_BYTES)
    size = int.from_bytes(prefix, "little")
    # The size comes from the file, so it is bounded before memory is taken for it.
    if size > min(file_bytes - PREFIX_BYTES, limits.HEADER_BYTES):
        raise LimitError("header is too long", file=name, got=size)
    return parse_header(
        prefix + repository.read(name, PREFIX_BYTES, size), file_bytes=file_bytes, file=name
    )
