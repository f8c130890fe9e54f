"""The output folder.

Everything is written beside its final place and moved in at the end, the manifest last.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from codecllm.converter.write.folders import (
    belongs_to_user,
    files_of,
    folders_of,
    is_file,
    is_folder,
    is_safe_anywhere,
    make_durable_folder,
    refuse_deep,
    refuse_links,
    remove,
    remove_empty_parents,
)
from codecllm.converter.write.journal import Journal
from codecllm.converter.write.moving import advice, read_list, refuse_files_of_others, write_list
from codecllm.converter.write.signals import signals_wait
from codecllm.formats import limits
from codecllm.formats.errors import (
    FormatError,
    OutputExistsError,
    UnsafePathError,
    UsageError,
    one_line,
)
from codecllm.formats.files import as_path, fsync_folder, read_file, write_atomically
from codecllm.formats.manifest.manifest import BASELINE_NAME, INDEX_NAME, MANIFEST_NAME, SHARD_NAME
from codecllm.formats.manifest.reading import parse_manifest

STAGING_NAME, JOURNAL_NAME = ".codecllm-partial", "journal"
_LOCK_TRIES = 100
_PARTIAL_NAMES = {f"{name}.partial" for name in (MANIFEST_NAME, BASELINE_NAME)}


class Staging:
    """A conversion's output under construction.

    `out/.codecllm-partial/` has three parts: `files/`, where everything is written; `old/`, which
    keeps the files of a container that is replaced until the new manifest is on the disk; and
    `journal`, by which the same conversion goes on after a kill. `commit` moves the files into
    `out`, the manifest last: no manifest, no container.

    If the context ends without a commit, `out` is as it was before. After a kill the next
    conversion into the folder first undoes the moves of the killed one.

    Attributes:
        out: the output folder.
        folder: where files are written before the commit.
        journal: the finished shards.
    """

    def __init__(self, out: str | Path, *, force: bool, fingerprint: str | None = None) -> None:
        """Makes and locks the folders.

        Args:
            out: the output folder: absent, empty, or, with `force`, a container that is then
                replaced.
            force: whether an existing container may be replaced.
            fingerprint: equal for conversions that write the same bytes: after a kill the finished
                shards of such a one are kept. None begins anew.

        Raises:
            OutputExistsError: `out` holds something else, or a container without `force`.
            UsageError: another conversion is writing there.
            OSError: the folder cannot be made.
        """
        self.out = as_path(out, "out")
        self._staging = self.out / STAGING_NAME
        self.folder = self._staging / "files"
        self.journal = Journal(self._staging / JOURNAL_NAME, self.folder)
        self._old = self._staging / "old"
        self._moving = self._staging / "moving"
        self._committed = False
        self._staged = False
        self._lock = -1
        self._made: list[Path] = []
        try:
            with signals_wait():
                self._lock_out()
                self._recover(force)
                self._make_staging(fingerprint)
        except BaseException as exc:
            self._release()
            self._explain(exc)
            raise

    def seal(self, manifest: bytes) -> None:
        """Makes the staged files a container: `folder` can be read as one from then on.

        Raises:
            OSError: the manifest cannot be written.
        """
        write_atomically(self.folder / MANIFEST_NAME, manifest)

    def commit(self) -> None:
        """Moves the sealed files into place, the manifest last; from then on `out` is a container.

        Raises:
            OSError: moving failed. `out` is then as it was before, with the container that was to
                be replaced.
            UnsafePathError: a link stands where a folder of the container belongs.
        """
        self._commit(last=MANIFEST_NAME)

    def commit_plain(self, *, last: str) -> None:
        """Moves the staged files of a plain model into place, `last` behind all others.

        Where no such file was staged (a source without config.json), any one comes last.
        """
        names = list(files_of(self.folder))
        self._commit(last=last if last in names else names[-1])

    def _commit(self, last: str) -> None:
        names = [*(name for name in files_of(self.folder) if name != last), last]
        with signals_wait():
            try:
                refuse_links(self.out, names)
                self._save_list(names)
                self._move_old()
                self._move(self.folder, self.out, names[:-1])
                # The last file makes it a container: all others are on the disk by now.
                self._move(self.folder, self.out, names[-1:])
            except BaseException:
                self._undo(names)
                raise
            self._committed = True

    def _move(self, source: Path, target: Path, names: Iterable[str]) -> None:
        """Moves files by renaming, and forces the entries to the disk."""
        names = list(names)
        folders = folders_of(target, names)
        # A name is on the disk only where those of its folders are: they come first.
        for folder in folders:
            make_durable_folder(folder)
        for name in names:
            os.replace(source / name, target / name)
        for folder in reversed(folders):
            fsync_folder(folder)

    def _save_list(self, names: list[str]) -> None:
        """Notes which files will be moved, before the first one is: a kill may come at any time."""
        # Before the list: a listed name that is in `out` alone is taken for one that was moved.
        # With `out` itself: staging is to hold the only copy of the old container.
        for folder in (*folders_of(self.folder, names), self._staging, self.out):
            fsync_folder(folder)
        write_list(self._moving, self.folder, names)

    def _move_old(self) -> None:
        """Puts the files of the container that is replaced aside, its manifest first."""
        self._old.mkdir(exist_ok=True)
        fsync_folder(self._staging)
        names = self._old_names()
        # Without its manifest the old container is none: no reader sees a mixture.
        first = [name for name in names if name == MANIFEST_NAME]
        for group in (first, [name for name in names if name != MANIFEST_NAME]):
            self._move(self.out, self._old, group)
            fsync_folder(self.out)

    def _undo(self, moving: list[str]) -> None:
        """Moves files back: new ones into staging, then old ones into place, their manifest last.

        Where a step fails, the old files that are left stay in staging for the next conversion.
        """
        # The last one first: without it the folder is no container any more.
        for name in reversed(moving):
            if not os.path.lexists(self.folder / name) and is_file(self.out, name):
                with suppress(OSError):
                    os.replace(self.out / name, self.folder / name)
            remove_empty_parents(self.out, name)
        old = files_of(self._old) if is_folder(self._old) else []
        with suppress(OSError):
            # Before an old file is back: where a listed name stands in `out` alone, the next
            # conversion takes it for a new one.
            for folder in (*folders_of(self.folder, moving), *folders_of(self.out, moving)):
                if is_folder(folder):
                    fsync_folder(folder)
            self._move(self._old, self.out, [name for name in old if name != MANIFEST_NAME])
            # The others are on the disk by now: the old container is whole again.
            self._move(self._old, self.out, [name for name in old if name == MANIFEST_NAME])
            if not self._holds_old():
                self._moving.unlink(missing_ok=True)
                # Before any staged file goes: with the list its name in `out` would mean a new one.
                fsync_folder(self._staging)

    def _holds_old(self) -> bool:
        """Whether files of a container that was to be replaced are in staging alone."""
        return not self._committed and is_folder(self._old) and bool(files_of(self._old))

    def _recover(self, force: bool) -> None:
        """Checks `out`, and undoes the commit of a killed conversion.

        A container in `out` stays untouched without `force`. What lies in staging may come from
        anyone who made the folder: nothing is moved unless all names lead to places inside it.
        """
        moving = self._listed_names()
        if moving and not self._is_unfinished(moving[-1]):
            self._remove_staging()  # only the cleaning behind the commit was missing
            moving = []
        elif is_folder(self._staging):
            with suppress(OSError):  # its last step was missing; one that is not empty stays
                self._staging.rmdir()
        # Without a manifest the old container may stand in staging alone: that comes first.
        if not moving or is_file(self.out, MANIFEST_NAME):
            self._check_out(force)
        if moving:
            self._undo(moving)
            if self._holds_old():
                raise OSError(
                    errno.EIO, "files of the replaced container cannot be moved back", self._old
                )
            self._check_out(force)

    def _remove_staging(self) -> None:
        # By the list the next conversion knows that the rest is to be removed.
        remove(self._staging, last=self._moving.name)

    def _is_unfinished(self, last: str) -> bool:
        """Whether a commit whose last file is `last` had not moved it."""
        return os.path.lexists(self.folder / last) or not is_file(self.out, last)

    def _listed_names(self) -> list[str]:
        """Returns the names that a stopped commit was to move; none where none was stopped.

        Raises:
            UnsafePathError: the list, or what lies beside it, is not what a conversion leaves.
                Nothing was changed.
        """
        if not is_folder(self._staging):
            return []
        try:
            refuse_deep(self._staging)
            if not os.path.lexists(self._moving):
                return []
            marks = read_list(self._moving)
            names = list(marks)
            old_names = files_of(self._old) if is_folder(self._old) else []
            for name in (*names, *old_names):
                if not is_safe_anywhere(name):
                    raise UnsafePathError("unsafe file name", file=ascii(name[:200]))
            refuse_links(self._staging, [f"{self.folder.name}/{name}" for name in names])
            refuse_links(self.out, [*names, *old_names])
            if self._is_unfinished(names[-1]):
                refuse_files_of_others(self.out, self.folder, marks, old_names)
        except FormatError as exc:
            step = advice(self.out, self._old)
            raise UnsafePathError(
                f"not the files of a stopped conversion, {step} ({one_line(exc)})",
                file=str(self._staging),
            ) from exc
        return names

    def _make_folder(self, folder: Path) -> None:
        """Makes a folder and its parents, and remembers which were not there."""
        if folder.exists():
            if not folder.is_dir():
                raise OutputExistsError("output exists and is not a folder", file=str(folder))
            return
        if folder.is_symlink():
            raise OutputExistsError("output is a link that leads nowhere", file=str(folder))
        self._make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir()
            self._made.append(folder)
            with suppress(PermissionError):  # to write into a folder one need not read it
                fsync_folder(folder.parent)

    def _lock_out(self) -> None:
        """Makes and locks the output folder.

        Another conversion that fails removes the folder that it had made. A lock on a removed
        folder locks nothing: its name may be that of a new one by now.
        """
        for tries_left in reversed(range(_LOCK_TRIES)):
            try:
                self._make_folder(self.out)
                self._take_lock()
                if os.path.samestat(os.fstat(self._lock), os.stat(self.out)):
                    return
            except FileNotFoundError:  # removed meanwhile, or no place for a folder
                if not tries_left:
                    raise
            self._unlock()
        raise OSError(errno.EAGAIN, "the output folder is replaced all the time", str(self.out))

    def _take_lock(self) -> None:
        self._lock = os.open(self.out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The kernel frees the lock with the process, after a kill too.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            self._made.clear()
            raise UsageError(
                "another conversion is writing to this folder", file=str(self.out)
            ) from exc

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _make_staging(self, fingerprint: str | None) -> None:
        """Makes the staging folder, or goes on with that of the same conversion."""
        self._staged = True
        for folder in (self._staging, self.folder):
            if not is_folder(folder) or not belongs_to_user(folder):
                remove(folder)
                folder.mkdir()
        for path in self._staging.iterdir():
            # Beside the finished shards nothing of an earlier conversion is needed any more.
            if path != self.folder and (path.name != JOURNAL_NAME or is_folder(path)):
                remove(path)
        self.journal.begin(fingerprint)
        for path in self.folder.iterdir():
            if path.name not in self.journal.finished:
                remove(path)

    def _check_out(self, force: bool) -> None:
        present = {path.name for path in self.out.iterdir()} - {STAGING_NAME}
        if not present:
            return
        if not is_file(self.out, MANIFEST_NAME):
            raise OutputExistsError(
                "output folder is not empty and not a container",
                file=str(self.out),
                got=", ".join(ascii(name)[1:-1] for name in sorted(present)[:5]),
            )
        if not force:
            raise OutputExistsError(
                "output folder holds a container: convert --force replaces it", file=str(self.out)
            )

    def _old_names(self) -> list[str]:
        """Returns the files of the container that `force` replaces, and no others of the folder."""
        if not is_file(self.out, MANIFEST_NAME):
            return []
        container_names = {MANIFEST_NAME, INDEX_NAME, BASELINE_NAME, *_PARTIAL_NAMES}
        container_names |= {
            path.name for path in self.out.iterdir() if SHARD_NAME.fullmatch(path.name)
        }
        with suppress(FormatError):  # a damaged manifest names nothing; its shards go all the same
            manifest = parse_manifest(read_file(self.out, MANIFEST_NAME, limits.MANIFEST_BYTES))
            container_names |= {record.name for record in manifest.files}
        return sorted(name for name in container_names if is_file(self.out, name))

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with signals_wait():
                replaced_names = files_of(self._old) if is_folder(self._old) else []
                self._release()
                for name in replaced_names:
                    remove_empty_parents(self.out, name)
        except BaseException as stopped:
            self._explain(stopped)
            raise
        if value is not None:
            self._explain(value)

    def _explain(self, error: BaseException) -> None:
        """Notes on an error which files are there now."""
        own_paths = [] if self._committed else self._made[::-1]
        if self._staged:  # otherwise it is not there, or that of another conversion
            own_paths = [self._staging, *own_paths]
        remaining_paths = [path for path in own_paths if os.path.lexists(path)]
        if remaining_paths:
            error.add_note(f"unfinished files could not be removed: {remaining_paths[0]}")
        if self._committed:
            error.add_note(f"the output in {self.out} is complete")

    def _release(self) -> None:
        """Removes staging and, without a commit, the folders that were made; ends the lock."""
        if self._staged and not self._holds_old():
            self._remove_staging()
        if not self._committed:
            for folder in reversed(self._made):
                with suppress(OSError):  # something else was put there meanwhile: it stays
                    folder.rmdir()
        self._unlock()
