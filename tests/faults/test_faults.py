"""After a fault the target holds a whole container or none, and the next run resumes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.write import lanes
from codecllm.converter.write.journal import Journal
from codecllm.converter.write.staging import STAGING_NAME, Staging
from codecllm.formats.container import Container
from codecllm.formats.errors import SourceError, UnsafePathError, UsageError
from tests.sources import bf16, write_source
from tests.tampering import flip_bit, reseal


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}": ("BF16", bf16(rng.standard_normal((200, 300))).reshape(200, 300)) for i in range(4)
    }
    return write_source(
        tmp_path_factory.mktemp("source") / "model", tensors, {"model_type": "llama"}
    )


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


OPTIONS = {"scheme": "lossless", "max_shard_bytes": 150_000, "workers": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    """The bytes of a conversion that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    convert(source, out, **OPTIONS)
    return _bytes(out)


def test_a_file_size_limit_is_an_error_with_nothing_left(tmp_path, source):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = [
        sys.executable,
        "-m",
        "codecllm",
        "convert",
        str(source),
        str(tmp_path / "out"),
        "--no-baseline",
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "--scheme", "lossless"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        env=environment,
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_conversions_into_one_folder(tmp_path, source):
    with (
        Staging(tmp_path / "out", force=False),
        pytest.raises(UsageError, match="another conversion"),
    ):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")


def _wait_for_lines(path, count):
    while path.read_bytes().count(b"\n") < count:
        time.sleep(0.01)


def _killed(source, out, shards=1):
    """Leaves the files of a conversion killed after some shards; returns the shards' inodes."""
    written = []

    def stop(path, *args):
        if len(written) == shards:
            _wait_for_lines(out / STAGING_NAME / "journal", 1 + shards)
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        return real(path, *args)

    child = os.fork()
    if child == 0:
        real, lanes.ShardWriter = lanes.ShardWriter, stop
        with contextlib.suppress(BaseException):
            convert(source, out, **OPTIONS | {"workers": 1})
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    files = out / STAGING_NAME / "files"
    return {path.name: path.stat().st_ino for path in files.iterdir()}


def test_the_same_conversion_goes_on_after_a_kill(tmp_path, source, undisturbed):
    out = tmp_path / "out"
    inodes = _killed(source, out, shards=2)
    assert len(inodes) == 2
    convert(source, out, **OPTIONS)
    assert _bytes(out) == undisturbed
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.json"])
def test_a_config_that_changed_begins_anew(tmp_path, source, changed):
    """Values of quantized sources and the channels of a tensor follow from it."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(source, model)
    (model / "tokenizer.json").write_text("{}")
    names = _killed(model, out, shards=2)
    files = out / STAGING_NAME / "files"
    before = {name: (files / name).stat().st_mtime_ns for name in names}
    document = json.loads((model / changed).read_text())
    (model / changed).write_text(json.dumps(document | {"more": 1}))
    convert(model, out, **OPTIONS)
    same = {name: (out / name).stat().st_mtime_ns for name in names} == before
    assert same == (changed != "config.json")


def test_shards_that_somebody_else_finished_are_made_again(
    tmp_path, source, undisturbed, monkeypatch
):
    """Who can see the source can compute the fingerprint, and write any shard beside it."""
    out = tmp_path / "out"
    real, written = lanes.ShardWriter, []

    def counted(path, *args):
        written.append(path.name)
        return real(path, *args)

    for user, finished in ((os.getuid(), 2), (os.getuid() + 1, 0)):
        assert len(_killed(source, out, shards=2)) == 2
        written.clear()
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "ShardWriter", counted)
            patch.setattr(os, "geteuid", lambda user=user: user)
            convert(source, out, **OPTIONS)
        assert _bytes(out) == undisturbed
        shards = [name for name in undisturbed if name.endswith(".safetensors")]
        assert len(written) == len(shards) - finished
        shutil.rmtree(out)


def test_another_conversion_begins_anew(tmp_path, source):
    options = OPTIONS | {"codec": "rans"}
    convert(source, tmp_path / "expected", **options)
    _killed(source, tmp_path / "out")
    convert(source, tmp_path / "out", **options)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "expected")


def test_a_finished_shard_that_rotted_is_made_again(tmp_path, source, undisturbed):
    out = tmp_path / "out"
    (name,) = _killed(source, out)
    flip_bit(out / STAGING_NAME / "files" / name, 5000)
    convert(source, out, **OPTIONS)
    assert _bytes(out) == undisturbed


def test_a_journal_that_was_torn_anywhere_loses_work_and_nothing_else(tmp_path, source):
    out = tmp_path / "out"
    names = set(_killed(source, out, shards=2))
    whole = (out / STAGING_NAME / "journal").read_bytes()
    fingerprint = json.loads(whole.split(b"\n")[0].partition(b" ")[2])["fingerprint"]
    for length in range(0, len(whole), 7):
        (tmp_path / "journal").write_bytes(whole[:length])
        journal = Journal(tmp_path / "journal", out / STAGING_NAME / "files")
        lines = whole[:length].count(b"\n")
        assert journal.begin(fingerprint) == (lines > 0)
        assert len(journal.finished) == max(0, lines - 1)
        assert set(journal.finished) <= names


CONVERTING = """
import os, signal, sys
from codecllm.converter import convert
from codecllm.converter.write.staging import Staging
def move(self, source, target, names):
    real(self, source, target, names)
    if target == self.out:
        os.kill(os.getpid(), signal.SIGKILL)
real = Staging._move
if sys.argv[3] == "stop":
    Staging._move = move
convert(sys.argv[1], sys.argv[2], scheme="lossless", force=sys.argv[3] == "stop")
"""
LOCALES = {
    "utf-8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"},
    # File names that are not ASCII are taken byte by byte.
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def test_a_commit_that_was_killed_is_undone_in_another_locale(tmp_path, source, undisturbed):
    source = shutil.copytree(source, tmp_path / "model")
    (source / "größe.json").write_text("{}")
    out = tmp_path / "out"
    convert(source, out, scheme="lossless")
    old = _bytes(out)
    assert "größe.json" in old

    def run(locale, *more):
        done = subprocess.run(
            [sys.executable, "-c", CONVERTING, *map(str, more)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **LOCALES[locale]},
        )
        return done.returncode, done.stderr

    assert run("utf-8", source, out, "stop")[0] == -signal.SIGKILL
    assert "codecllm.json" not in _bytes(out)
    plain = shutil.copytree(source, tmp_path / "plain", ignore=lambda *_: ["größe.json"])
    code, text = run("ascii", plain, out, "go")
    assert code == 1, text
    assert "OutputExistsError: " in text
    assert _bytes(out) == old


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_or_file_in_the_place_of_the_staging_folder(tmp_path, source, undisturbed, kind):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    if kind == "link":
        (out / STAGING_NAME).symlink_to(elsewhere)
    else:
        (out / STAGING_NAME).write_text("a file")
    convert(source, out, **OPTIONS)
    assert _bytes(out) == undisturbed
    assert not os.path.lexists(out / STAGING_NAME)
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]


def test_links_inside_a_container_that_is_replaced_are_not_followed(tmp_path, source):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    convert(source, out, **OPTIONS)
    elsewhere.mkdir()
    (elsewhere / "keys").write_text("secret")
    (elsewhere / "config.json").write_text("theirs")
    (out / "sub").symlink_to(elsewhere)
    (out / "linked.txt").symlink_to(elsewhere / "keys")

    def edit(document):
        for name in ("sub/keys", "linked.txt"):
            document["files"].append({"name": name, "bytes": 6, "sha256": "0" * 64})

    reseal(out, edit)
    convert(source, out, force=True, **OPTIONS)
    assert (elsewhere / "keys").read_text() == "secret"
    assert (elsewhere / "config.json").read_text() == "theirs"
    assert not os.path.lexists(out / "linked.txt")
    Container(out).close()


def test_a_link_where_a_folder_of_the_container_belongs_is_refused(tmp_path, source):
    source = shutil.copytree(source, tmp_path / "model")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    convert(source, out, **OPTIONS)
    before = _bytes(out)
    shutil.move(out / "1_Pooling", elsewhere)
    (out / "1_Pooling").symlink_to(elsewhere)
    (elsewhere / "config.json").write_text("theirs")
    with pytest.raises(UnsafePathError, match="a link stands"):
        convert(source, out, force=True, **OPTIONS)
    assert (elsewhere / "config.json").read_text() == "theirs"
    assert _bytes(out) == before


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_modes_follow_the_umask(tmp_path, source, mask):
    before = os.umask(mask)
    try:
        convert(source, tmp_path / "out", **OPTIONS)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_a_source_that_changes_meanwhile_is_refused_even_with_its_times_put_back(tmp_path, source):
    source = shutil.copytree(source, tmp_path / "model")
    (source / "tokenizer_config.json").write_text("{}")
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        path = source / name
        status = path.stat()

        def rewrite(*_, path=path, status=status):
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

        with pytest.raises(SourceError, match="changed while it was read") as caught:
            convert(source, tmp_path / "out", progress=rewrite, **OPTIONS)
        assert caught.value.file == name
        assert not (tmp_path / "out").exists()


IMPORTING = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
sys.meta_path.insert(0, Finder())
from codecllm.cli import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_modules_are_imported_ends_with_one_line(number, code):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, number], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr == f"error: stopped by {number}\n"


def test_read_only_target(tmp_path, source):
    if os.geteuid() == 0:
        target = Path("/proc/codecllm-out")
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "codecllm", "convert", str(source), str(target), "--no-baseline"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr


def test_threads_end_with_the_conversion(tmp_path, source):
    before = threading.active_count()
    convert(source, tmp_path / "out", workers=4)
    assert threading.active_count() == before
