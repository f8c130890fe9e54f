"""A folder that a stranger made is safe as the output folder of a conversion."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.exports.export import export
from codecllm.converter.write.journal import Journal
from codecllm.converter.write.moving import mark_of
from codecllm.converter.write.staging import STAGING_NAME
from codecllm.formats.checksums import xxh3_hex
from codecllm.formats.container import Container
from codecllm.formats.errors import OutputExistsError, UnsafePathError
from tests.sources import bf16, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    values = np.random.default_rng(0).standard_normal((40, 64))
    folder = tmp_path_factory.mktemp("source") / "model"
    write_source(folder, {"a.weight": ("BF16", bf16(values))}, {"model_type": "llama"})
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def downloaded(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("downloaded") / "out"
    convert(source, out)
    return out


@pytest.fixture
def out(downloaded, tmp_path):
    """A container as a stranger may offer it, in a folder with files of the user."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "keys").write_text("precious")
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    out = shutil.copytree(downloaded, tmp_path / "home" / "out")
    (out / STAGING_NAME / "files").mkdir(parents=True)
    (out / STAGING_NAME / "old").mkdir()
    return out


def _entries(folder):
    """Every path below a folder with what stands there; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        else:
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def _outside(out):
    found = _entries(out.parents[1])
    return {name: data for name, data in found.items() if not name.startswith("home")}


def _list(out, text):
    """Writes a list whose marks fit: only the names themselves can give it away."""
    lines = []
    for name in text.split("\n"):
        path = out / name
        mark = mark_of(path.resolve().parent, path.name) if path.is_file() else "0" * 16
        lines.append(f"{mark} {name}")
    (out / STAGING_NAME / "moving").write_text("\n".join(lines))


def _up(out):
    _list(out, "../../precious\nnothing")


def _absolute(out):
    _list(out, f"{out.parents[1]}/precious\nnothing")


def _folders_elsewhere(out):
    _list(out, f"{out.parents[1]}/empty/folder/x\nnothing")


def _old_file_through_a_link(out):
    (out / STAGING_NAME / "old" / "linked").mkdir()
    (out / STAGING_NAME / "old" / "linked" / "new_keys").write_text("of the stranger")
    (out / "linked").symlink_to(out.parents[1] / "victim")
    _list(out, "nothing")


def _new_file_through_a_link(out):
    (out / "linked").symlink_to(out.parents[1] / "victim")
    _list(out, "linked/keys\nnothing")


def _folder_through_a_link(out):
    (out / "linked").symlink_to(out.parents[1] / "empty")
    _list(out, "linked/folder/x\nnothing")


def _staged_files_are_a_link(out):
    (out / STAGING_NAME / "files").rmdir()
    (out / STAGING_NAME / "files").symlink_to(out.parents[1] / "victim")
    _list(out, "config.json\nnothing")


def _staged_folder_is_a_link(out):
    (out / STAGING_NAME / "files" / "sub").symlink_to(out.parents[1] / "victim")
    _list(out, "sub/config.json\nnothing")


def _staging_inside_the_old_files(out):
    (out / STAGING_NAME / "old" / STAGING_NAME).mkdir()
    (out / STAGING_NAME / "old" / STAGING_NAME / "moving").write_text("nothing")
    _list(out, "nothing")


def _nothing_listed(out):
    _list(out, "")


def _file_of_the_user(out):
    (out / "notes.txt").write_text("of the stranger")
    _list(out, "notes.txt\nnothing")
    (out / "notes.txt").write_text("of the user")


def _old_file_over_one_of_the_user(out):
    (out / "notes.txt").write_text("of the user")
    (out / STAGING_NAME / "old" / "notes.txt").write_text("of the stranger")
    _list(out, "nothing")


def _old_file_over_a_listed_one(out):
    (out / "notes.txt").write_text("of the user")
    (out / STAGING_NAME / "old" / "notes.txt").write_text("of the stranger")
    (out / STAGING_NAME / "files" / "notes.txt").write_text("of the stranger")
    _list(out, "notes.txt\nnothing")


def _without_marks(out):
    (out / STAGING_NAME / "moving").write_text("config.json\nnothing")


REFUSED = [
    _file_of_the_user,
    _old_file_over_one_of_the_user,
    _old_file_over_a_listed_one,
    _without_marks,
    _up,
    _absolute,
    _folders_elsewhere,
    _old_file_through_a_link,
    _new_file_through_a_link,
    _folder_through_a_link,
    _staged_files_are_a_link,
    _staged_folder_is_a_link,
    _staging_inside_the_old_files,
    _nothing_listed,
]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("make", REFUSED)
def test_a_staging_folder_of_a_stranger_moves_nothing(source, out, make, force, manifest):
    if not manifest:
        (out / "codecllm.json").unlink()
    make(out)
    before = _entries(out.parents[1])
    with pytest.raises(UnsafePathError, match="remove this folder") as caught:
        convert(source, out, force=force)
    assert caught.value.file == str(out / STAGING_NAME)
    assert _entries(out.parents[1]) == before


@pytest.mark.parametrize("make", REFUSED)
def test_an_export_moves_nothing_either(downloaded, out, make):
    make(out)
    before = _entries(out.parents[1])
    with pytest.raises(UnsafePathError, match="remove this folder"):
        export(downloaded, out)
    assert _entries(out.parents[1]) == before


def _kill_of_an_older_version(out, moved):
    """The list of an older version had no marks: undoing its commit is left to the user."""
    staged, old = out / STAGING_NAME / "files", out / STAGING_NAME / "old"
    names = [name for name in _entries(out) if (out / name).is_file()]
    (out / STAGING_NAME / "moving").write_text("\n".join(names))
    for name in names:
        (staged / name).parent.mkdir(exist_ok=True)
        (staged / name).write_bytes(b"new")
    # The manifest first, as a commit does.
    for name in sorted(names, key=lambda name: name != "codecllm.json")[:moved]:
        (old / name).parent.mkdir(exist_ok=True)
        (out / name).rename(old / name)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("moved", [1, 3, 5])
def test_the_advice_about_a_kill_of_an_older_version_saves_the_container(
    source, out, downloaded, force, moved
):
    _kill_of_an_older_version(out, moved)
    before = _entries(out)
    with pytest.raises(UnsafePathError, match="move all") as caught:
        convert(source, out, force=force)
    assert _entries(out) == before
    assert f"{STAGING_NAME}/old to {out}," in str(caught.value)
    # What the message says.
    shutil.copytree(out / STAGING_NAME / "old", out, dirs_exist_ok=True)
    Container(out).close()
    shutil.rmtree(out / STAGING_NAME)
    assert _entries(out) == _entries(downloaded)
    convert(source, out, force=True)


def test_beside_a_whole_container_the_staging_folder_can_be_removed(source, out):
    _without_marks(out)
    shutil.copy(out / "codecllm.json", out / STAGING_NAME / "old")
    with pytest.raises(UnsafePathError, match="conversion, remove this folder"):
        convert(source, out, force=True)


def test_a_container_is_not_touched_without_force(source, out):
    """Not even by a list of names that are all inside the folder."""
    _list(out, "config.json\nsub/config.json\nnothing")
    (out / STAGING_NAME / "old" / "config.json").write_text("of the stranger")
    before = _entries(out)
    with pytest.raises(OutputExistsError, match="--force replaces it"):
        convert(source, out)
    assert _entries(out) == before


def test_a_folder_in_the_place_of_the_manifest_is_no_container(source, tmp_path):
    (tmp_path / "out" / "codecllm.json").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("of the user")
    before = _entries(tmp_path)
    with pytest.raises(OutputExistsError, match="not a container"):
        convert(source, tmp_path / "out", force=True)
    assert _entries(tmp_path) == before


LINKED = ("moving.partial", "journal", "old", "files")


@pytest.mark.parametrize("name", LINKED)
def test_no_file_is_written_through_a_link_of_the_staging_folder(source, out, downloaded, name):
    path = out / STAGING_NAME / name
    shutil.rmtree(path, ignore_errors=True)
    path.symlink_to(out.parents[1] / ("victim" if name in ("old", "files") else "precious"))
    before = _outside(out)
    convert(source, out, force=True)
    assert _outside(out) == before
    assert _entries(out) == _entries(downloaded)


def test_a_partial_manifest_that_is_a_link_is_not_written_through(source, out):
    (out / "codecllm.json.partial").symlink_to(out.parents[1] / "precious")
    before = _outside(out)
    convert(source, out, force=True)
    assert _outside(out) == before
    Container(out).close()


def _pipe(path):
    os.mkfifo(path)


def _sparse(path):
    path.touch()
    os.truncate(path, 1 << 42)


def _binary(path):
    path.write_bytes(b"\xff\xfe\0")


def _long(path):
    path.write_bytes(b"a" * 5000)


MALFORMED = [Path.mkdir, _pipe, _sparse, _binary, _long]


@pytest.mark.parametrize("make", MALFORMED)
def test_a_list_that_no_conversion_wrote_is_refused(source, out, make):
    make(out / STAGING_NAME / "moving")
    for force in (False, True):
        with pytest.raises(UnsafePathError, match="remove this folder"):
            convert(source, out, force=force)


def _line(text):
    return xxh3_hex(text).encode() + b" " + text + b"\n"


def _broken_line(path):
    path.write_bytes(_line(b"{"))


def _deep_line(path):
    path.write_bytes(_line(b"[" * 100_000))


def _line_of_no_text(path):
    path.write_bytes(_line(b'"\xff"'))


@pytest.mark.parametrize("make", [*MALFORMED, _broken_line, _deep_line, _line_of_no_text])
def test_a_malformed_journal_is_none(source, out, downloaded, make):
    make(out / STAGING_NAME / "journal")
    convert(source, out, force=True)
    assert _entries(out) == _entries(downloaded)


LINES = [b"{", b"[" * 100_000, b'"\xff"', b"[]", b"1", b"{}", b'{"shard":1,"tensors":2}', b"null"]


@pytest.mark.parametrize("text", LINES)
def test_a_malformed_line_of_the_same_conversion_names_no_shard(tmp_path, text):
    journal = Journal(tmp_path / "journal", tmp_path)
    journal.begin("0123")
    with open(tmp_path / "journal", "ab") as file:
        file.write(_line(text))
    again = Journal(tmp_path / "journal", tmp_path)
    assert again.begin("0123")
    assert not again.finished


@pytest.mark.parametrize("make", [_pipe, _sparse, _binary, _long])
def test_a_malformed_manifest_is_replaced(source, out, downloaded, make):
    (out / "codecllm.json").unlink()
    make(out / "codecllm.json")
    convert(source, out, force=True)
    assert _entries(out) == _entries(downloaded)


@pytest.mark.parametrize("name", ["moving.partial", "old", "other"])
@pytest.mark.parametrize("make", MALFORMED)
def test_other_litter_of_the_staging_folder_goes(source, out, downloaded, name, make):
    shutil.rmtree(out / STAGING_NAME / name, ignore_errors=True)
    make(out / STAGING_NAME / name)
    convert(source, out, force=True)
    assert _entries(out) == _entries(downloaded)


@pytest.mark.parametrize("part", ["files", "old", "other"])
def test_folders_that_are_nested_deeply_are_refused(source, out, part):
    path = out / STAGING_NAME / part
    path.mkdir(exist_ok=True)
    for _ in range(1200):
        path = f"{path}/a"
        os.mkdir(path)
    with pytest.raises(UnsafePathError, match=r"remove this folder.*nested too deeply"):
        convert(source, out, force=True)
    subprocess.run(["rm", "-r", out / STAGING_NAME], check=True)
    convert(source, out, force=True)
