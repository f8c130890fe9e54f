"""Conversions into one folder at the same time: one of them goes through, alone."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from codecllm.converter.write import staging
from codecllm.converter.write.staging import STAGING_NAME, Staging
from codecllm.formats.errors import UsageError


class _Waiting:
    """A second conversion that has opened the output folder and waits right before the lock."""

    def __init__(self, monkeypatch, out):
        self._opened, self._go = threading.Event(), threading.Event()
        self._real = fcntl.flock
        self.outcome = None
        monkeypatch.setattr(staging.fcntl, "flock", self._flock)
        self._thread = threading.Thread(target=self._begin, args=(out,))
        self._thread.start()
        assert self._opened.wait(60)

    def _flock(self, descriptor, operation):
        if threading.current_thread() is self._thread and not self._go.is_set():
            self._opened.set()
            assert self._go.wait(60)
        return self._real(descriptor, operation)

    def _begin(self, out):
        try:
            self.outcome = Staging(out, force=False)
        except Exception as exc:
            self.outcome = exc

    def go_on(self):
        self._go.set()
        self._thread.join(60)
        return self.outcome


def _failed(conversion):
    conversion.__exit__(None, None, None)
    assert not conversion.out.exists()


def test_a_folder_that_was_removed_and_made_anew_is_not_locked_twice(monkeypatch, tmp_path):
    out = tmp_path / "deep" / "out"
    first = Staging(out, force=False)
    second = _Waiting(monkeypatch, out)
    _failed(first)
    with Staging(out, force=False) as third:
        (third.folder / "kept").write_text("of the third")
        outcome = second.go_on()
        assert isinstance(outcome, UsageError), outcome
        assert "another conversion is writing" in str(outcome)
        assert os.listdir(third.folder) == ["kept"]
    assert not out.exists()


def test_a_folder_that_was_removed_is_made_and_locked_by_the_next(monkeypatch, tmp_path):
    out = tmp_path / "deep" / "out"
    first = Staging(out, force=False)
    second = _Waiting(monkeypatch, out)
    _failed(first)
    with second.go_on() as conversion:
        assert os.listdir(out) == [STAGING_NAME]
        with pytest.raises(UsageError, match="another conversion"):
            Staging(out, force=False)
        assert conversion.folder.is_dir()
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_never_stays_is_an_error(monkeypatch, tmp_path):
    real = os.path.samestat
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with pytest.raises(OSError, match="replaced all the time"):
        Staging(tmp_path / "out", force=False)
    monkeypatch.setattr(os.path, "samestat", real)
    Staging(tmp_path / "out", force=False).__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_where_no_folder_can_be_made_the_error_says_so(monkeypatch, tmp_path):
    def refused(self, **_):
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(FileNotFoundError):
        Staging(tmp_path / "out", force=False)
