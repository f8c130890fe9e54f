"""The folder in which a signature is made: a killed process's one goes with the next signature."""

from __future__ import annotations

import os
import signal
import time

import pytest

from codecllm.verifier.own_folder import PREFIX, own_folder

OLD = (time.time() - 3600,) * 2


def _left(parent):
    """Leaves the folder of a killed process."""
    child = os.fork()
    if child == 0:
        with own_folder(parent) as folder:
            (folder / "a").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (folder,) = (path for path in parent.iterdir() if path.name.startswith(PREFIX))
    return folder


def test_a_folder_is_there_for_its_block_alone(tmp_path):
    with own_folder(tmp_path) as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ZeroDivisionError), own_folder(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_goes_with_the_next(tmp_path):
    folder = _left(tmp_path)
    with own_folder(tmp_path):
        assert folder.exists()  # it is young: its owner may be about to lock it
    os.utime(folder, OLD)
    with own_folder(tmp_path) as other:
        assert list(tmp_path.iterdir()) == [other]


def test_what_is_held_or_is_no_folder_stays(tmp_path):
    target = tmp_path / "precious"
    target.mkdir()
    (target / "a").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / ".codecllm-partial").mkdir()
    with own_folder(tmp_path) as held:
        for path in (held, target, tmp_path / f"{PREFIX}file", tmp_path / ".codecllm-partial"):
            os.utime(path, OLD)
        before = {path.name for path in tmp_path.iterdir()}
        with own_folder(tmp_path) as other:
            assert {path.name for path in tmp_path.iterdir()} == before | {other.name}
        assert held.exists() and (target / "a").exists()


@pytest.mark.parametrize(
    "names", [["notes/a.txt"], ["abcdefgh/a", "abcdefgh/b"], ["abcdefgh/keys/a.txt"]]
)
def test_folders_of_the_user_with_such_a_name_stay(tmp_path, names):
    for name in names:
        path = tmp_path / f"{PREFIX}{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret")
    os.utime(tmp_path / f"{PREFIX}{names[0].split('/')[0]}", OLD)
    with own_folder(tmp_path):
        pass
    assert all((tmp_path / f"{PREFIX}{name}").read_text() == "secret" for name in names)
