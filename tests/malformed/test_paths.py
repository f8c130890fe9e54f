"""Names, links and kinds of files.

Nothing outside the folder is read, nothing hangs, and each fault has its exit code.
"""

from __future__ import annotations

import os

import pytest

from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    NotAContainerError,
    TruncatedError,
    UnsafePathError,
)
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from tests import tampering
from tests.malformed.builders import SHARD, read_everything

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _link_outside(folder):
    path = folder / SHARD
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def _link_to_passwd(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")


def _fifo(folder):
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def _folder(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


def _device(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("/dev/zero")


def _content(data):
    return lambda folder: (folder / SHARD).write_bytes(data)


def _manifest_is_a_link(folder):
    path = folder / MANIFEST_NAME
    path.rename(folder.parent / "m.json")
    path.symlink_to(folder.parent / "m.json")


FLAWS = {
    "shard is a link outside": (_link_outside, UnsafePathError, 5),
    "side file is a link to a system file": (_link_to_passwd, UnsafePathError, 5),
    "shard is a fifo": (_fifo, UnsafePathError, 5),
    "shard is a folder": (_folder, UnsafePathError, 5),
    "shard is a device": (_device, UnsafePathError, 5),
    "manifest is a link outside": (_manifest_is_a_link, UnsafePathError, 5),
    "shard is deleted": (lambda folder: (folder / SHARD).unlink(), TruncatedError, 1),
    "shard is empty": (_content(b""), TruncatedError, 1),
    "shard is an lfs pointer": (
        _content(b"version https://git-lfs.github.com/spec/v1\noid x\n"),
        NotAContainerError,
        1,
    ),
    "shard is a page": (_content(b"<!doctype html>" + b" " * 99), NotAContainerError, 1),
    "shard is a zip": (_content(b"PK\x03\x04" + bytes(500)), NotAContainerError, 1),
    "shard is a gguf": (_content(b"GGUF" + bytes(500)), NotAContainerError, 1),
    "shard is a pickle": (_content(b"\x80\x02" + bytes(500)), NotAContainerError, 1),
    "manifest is deleted": (
        lambda folder: (folder / MANIFEST_NAME).unlink(),
        NotAContainerError,
        1,
    ),
    "folder is deleted": (
        lambda folder: folder.rename(folder.parent / "gone"),
        NotAContainerError,
        1,
    ),
}


def _read_tensors_first(folder):
    with Container(folder) as container:
        for name in container.records:
            container.tensor(name)
    read_everything(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", FLAWS)
def test_flaw_has_its_error_and_exit_code(folder, name):
    damage, expected, code = FLAWS[name]
    damage(folder)
    with pytest.raises(CodecLLMError) as caught:
        _read_tensors_first(folder)
    assert type(caught.value) is expected, repr(caught.value)
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)


def test_links_of_the_hub_cache_are_followed(pristine, tmp_path):
    entry = tmp_path / "models--user--name"
    snapshot = entry / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, path in enumerate(sorted(pristine.iterdir())):
        blob = entry / "blobs" / f"blob{number}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert read_everything(snapshot) == read_everything(pristine)


def test_links_into_another_entry_of_the_hub_cache_are_refused(pristine, tmp_path):
    mine, other = tmp_path / "models--user--name", tmp_path / "models--user--other"
    snapshot = mine / "snapshots" / COMMIT
    tampering.copy_of(pristine, snapshot)
    (other / "blobs").mkdir(parents=True)
    (snapshot / SHARD).rename(other / "blobs" / "b")
    (snapshot / SHARD).symlink_to(other / "blobs" / "b")
    with pytest.raises(UnsafePathError, match="symbolic link"):
        read_everything(snapshot)


def test_a_folder_reached_by_a_link_is_read(pristine, tmp_path):
    (tmp_path / "link").symlink_to(pristine)
    assert read_everything(tmp_path / "link") == read_everything(pristine)


def test_tensor_names_never_become_paths(tmp_path):
    import numpy as np

    from codecllm.converter import convert
    from codecllm.converter.exports.export import export
    from tests.sources import write_source

    name = "../../evil/weight"
    source = write_source(tmp_path / "source", {name: ("F32", np.ones((3, 4), np.float32))})
    before = sorted(path for path in tmp_path.rglob("*"))
    convert(source, tmp_path / "c", scheme="lossless")
    export(tmp_path / "c", tmp_path / "plain")
    made = {
        path.parent.name for path in tmp_path.rglob("*") if path not in before and path.is_file()
    }
    assert made == {"c", "plain"}
    assert read_everything(tmp_path / "c") == {name: np.ones((3, 4), np.float32).tobytes()}
