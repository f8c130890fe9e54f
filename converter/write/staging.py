"""The output folder: files are written beside their final place and moved in at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from codecllm.formats.errors import FormatError, OutputExistsError, UsageError
from codecllm.formats.files import fsync_folder, write_atomically
from codecllm.formats.manifest.manifest import BASELINE_NAME, INDEX_NAME, MANIFEST_NAME, SHARD_NAME
from codecllm.formats.manifest.reading import parse_manifest

STAGING_NAME = ".codecllm-partial"


class Staging:
    """A conversion's output under construction.

    Files are made in `out/.codecllm-partial/`. `commit` moves them into `out`, the manifest last:
    no manifest, no container. Leaving the context without a commit removes everything that was
    written, and `out` itself if it was made here. A conversion that was killed leaves only the
    staging folder, which the next one removes.
    """

    def __init__(self, out: str | Path, *, force: bool) -> None:
        """Makes and locks the folders.

        Args:
            out: the output folder: absent, empty, or, with `force`, a container that is then
                replaced.
            force: whether an existing container may be replaced.

        Raises:
            OutputExistsError: `out` holds something else, or a container without `force`.
            UsageError: another conversion is writing there.
            OSError: the folder cannot be made.
        """
        self.out = Path(out)
        self._made_out = not self.out.exists()
        self._check_out(force)
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._lock)
            raise UsageError("another conversion is writing to this folder", file=str(out)) from exc
        self.folder = self.out / STAGING_NAME
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._committed = False

    def commit(self, manifest: bytes) -> None:
        """Moves the staged files into place and writes the manifest.

        From then on `out` is a container.
        """
        self._remove_old()
        self._move(self._staged())
        write_atomically(self.out / MANIFEST_NAME, manifest)
        self._committed = True

    def commit_plain(self, *, last: str) -> None:
        """Moves the staged files of a plain model into place, `last` behind all others."""
        names = self._staged()
        self._move([name for name in names if name != last])
        self._move([name for name in names if name == last])
        self._committed = True

    def _staged(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()
        )

    def _move(self, names: list[str]) -> None:
        for name in names:
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / name, self.out / name)
        for parent in {parent for name in names for parent in Path(name).parents}:
            fsync_folder(self.out / parent)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self._committed and self._made_out:
            with suppress(OSError):  # something else was put there meanwhile: it stays
                self.out.rmdir()
        os.close(self._lock)

    def _check_out(self, force: bool) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise OutputExistsError("output exists and is not a folder", file=str(self.out))
        present = {path.name for path in self.out.iterdir()} - {STAGING_NAME}
        if not present:
            return
        if MANIFEST_NAME not in present:
            raise OutputExistsError(
                "output folder is not empty and not a container", file=str(self.out)
            )
        if not force:
            raise OutputExistsError(
                "output folder holds a container; --force replaces it", file=str(self.out)
            )

    def _remove_old(self) -> None:
        """Removes the container that `force` replaces.

        Its manifest first, then only files that are known to be its own.
        """
        manifest = self.out / MANIFEST_NAME
        if not manifest.exists():
            return
        owned = {INDEX_NAME, BASELINE_NAME}
        owned |= {path.name for path in self.out.iterdir() if SHARD_NAME.fullmatch(path.name)}
        with suppress(FormatError):  # a damaged manifest names nothing; its shards go all the same
            owned |= {record.name for record in parse_manifest(manifest.read_bytes()).files}
        manifest.unlink()
        fsync_folder(self.out)
        for name in owned:
            (self.out / name).unlink(missing_ok=True)
