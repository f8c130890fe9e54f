"""Safe files: no unsafe name or link opens anything, and writes are atomic."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from codecllm.formats.errors import (
    LimitError,
    NotAContainerError,
    TruncatedError,
    UnsafePathError,
    UsageError,
)
from codecllm.formats.files import (
    Excerpt,
    SafeFile,
    as_path,
    describe_foreign,
    is_safe_name,
    read_file,
    refuse_foreign,
    write_atomically,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_reads_are_exact(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    with SafeFile(tmp_path, "f") as file:
        assert (file.size, file.read(0, 100), file.read(98, 2), file.read(100, 0)) == (
            100,
            bytes(range(100)),
            b"bc",
            b"",
        )
        target = bytearray(5)
        file.read_into(10, memoryview(target)[1:4])
        assert target == b"\0\x0a\x0b\x0c\0"
        with pytest.raises(TruncatedError, match="ends early") as caught:
            file.read(90, 11)
        assert (caught.value.file, caught.value.byte, caught.value.expected) == ("f", 100, 101)
    file.close()
    with pytest.raises(OSError, match="descriptor"):
        file.read(0, 1)


def test_an_excerpt_reads_as_the_file_does_and_nothing_else(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    with SafeFile(tmp_path, "f") as file:
        excerpt = Excerpt(file.name, 20, file.read(20, 30))
        for offset, length in [(20, 30), (20, 0), (50, 0), (49, 1), (33, 5)]:
            assert excerpt.read(offset, length) == file.read(offset, length)
    for offset, length in [(19, 1), (50, 1), (20, 31), (49, 2), (21, -1)]:
        with pytest.raises(ValueError, match="was not read"):
            excerpt.read(offset, length)


def test_a_replaced_file_is_not_mixed_in(tmp_path):
    (tmp_path / "f").write_bytes(b"old" * 10)
    with SafeFile(tmp_path, "f") as file:
        assert file.unchanged()
        write_atomically(tmp_path / "f", b"new" * 10)
        assert file.read(0, 30) == b"old" * 10
        assert not file.unchanged()
        (tmp_path / "f").unlink()
        assert not file.unchanged()


GOOD = [
    "a",
    "config.json",
    "model-00001-of-00002.safetensors",
    "1_Pooling/config.json",
    "_x",
    "a.b+c-d",
    "x" * 128,
    "1 old (copy)/config.json",
    "my vocab.tiktoken",
    "a b",
    "a/b/c",
    "a..b",
    "+x",
    "$x",
    "é",
    "\uff08\u4e2d\u6587\uff09.json",
    "x" * 255,
    "d/" + "x" * 129,
    "/".join("abcdefgh"),
]
BAD = [
    *(
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/../b",
        "a//b",
        "/a",
        "a/",
        ".git",
        "a/.git",
        "-x",
        "a.",
    ),
    *(
        "a\\b",
        "a\n",
        "a\0",
        "\uff0e\uff0e",
        "\uff0f",
        "a\u202eb",
        "a\u200b",
        "e\u0301",
        " a",
        "a ",
        "a /b",
        "~",
        "/".join("abcdefghi"),
        "d/" * 4 + "x" * 255 + "/" + "y" * 255 + "/" + "z" * 255 + "/" + "w" * 255,
        "C:x",
        "x" * 256,
        "a/b.",
    ),
]


@pytest.mark.parametrize("name", GOOD)
def test_safe_names(name):
    assert is_safe_name(name)


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_unsafe_names_open_nothing(tmp_path, name):
    assert not is_safe_name(name)
    with pytest.raises(UnsafePathError, match="unsafe file name") as caught:
        SafeFile(tmp_path, name)
    assert caught.value.exit_code == 5


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(
            f"/proc/self/fd/{folder}/{path.name}"
        )  # a socket's own path may not be longer than 107 bytes
    os.close(folder)


def _link(target):
    return lambda path: path.symlink_to(target)


def _link_inside(path):
    (path.parent / "inside").write_bytes(b"x")
    path.symlink_to("inside")


KINDS = {
    "fifo": (_fifo, UnsafePathError, "regular"),
    "socket": (_socket, UnsafePathError, "regular"),
    "folder": (lambda path: path.mkdir(), UnsafePathError, "regular"),
    "link to a device": (_link("/dev/null"), UnsafePathError, "symbolic link"),
    "link outside": (_link("/etc/hostname"), UnsafePathError, "symbolic link"),
    "link upwards": (_link("../elsewhere"), UnsafePathError, "symbolic link"),
    "link inside": (_link_inside, UnsafePathError, "symbolic link"),
    "link to itself": (_link("f"), UnsafePathError, "regular|symbolic link"),
    "dangling link": (_link("/nowhere/at/all"), UnsafePathError, "symbolic link"),
    "missing": (lambda path: None, TruncatedError, "missing"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files(tmp_path, name):
    make, expected, words = KINDS[name]
    make(tmp_path / "f")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(expected, match=words) as caught:
        SafeFile(tmp_path, "f")
    assert caught.value.file == "f"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_inside_what_is_no_folder_is_missing(tmp_path):
    """The name is safe and listed, but its folder is a file: this left as NotADirectoryError."""
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(TruncatedError, match="missing"):
        SafeFile(tmp_path, "a/b")


def test_a_subfolder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_bytes(b"{}")
    (tmp_path / "c" / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match="symbolic link"):
        SafeFile(tmp_path / "c", "1_Pooling/config.json")


def _cache(base, target, *, blobs_is_link=False):
    """A snapshot of a Hub cache in which `f` is a link to `target`."""
    snapshot = base / "models--a--b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = base / "models--a--b" / "blobs"
    if blobs_is_link:
        (base / "real").mkdir()
        blobs.symlink_to(base / "real")
    else:
        blobs.mkdir()
    (blobs / "0123").write_bytes(b"blob")
    (snapshot / "f").symlink_to(target)
    return snapshot


def test_links_into_the_blobs_of_the_same_cache_entry_are_followed(tmp_path):
    with SafeFile(_cache(tmp_path, "../../blobs/0123"), "f") as file:
        assert file.read(0, 4) == b"blob"


@pytest.mark.parametrize(
    "target",
    ["../../refs/main", "../../../other/blobs/0123", "../../blobs/sub/0123", "/etc/hostname"],
)
def test_other_links_of_a_cache_are_not_followed(tmp_path, target):
    with pytest.raises(UnsafePathError, match="symbolic link"):
        SafeFile(_cache(tmp_path, target), "f")


def test_blobs_that_are_a_link_are_not_followed(tmp_path):
    with pytest.raises(UnsafePathError, match="symbolic link"):
        SafeFile(_cache(tmp_path, "../../blobs/0123", blobs_is_link=True), "f")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\n  <HTML lang=en>", "HTML"),
        (b"<?xml version='1.0'?>", "HTML"),
        (b"PK\x03\x04", "zip"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x80\x02}q\0", "pickle"),
        (b"\x80\x04\x95", "pickle"),
    ],
)
def test_foreign_files_are_named(tmp_path, head, words):
    assert words in describe_foreign(head)
    (tmp_path / "f").write_bytes(head)
    with SafeFile(tmp_path, "f") as file, pytest.raises(NotAContainerError, match=words):
        refuse_foreign(file)


@pytest.mark.parametrize("head", [b"", b"{", b"\x48\x01\0\0\0\0\0\0{", b"CLCT"])
def test_other_files_are_not_called_foreign(tmp_path, head):
    (tmp_path / "f").write_bytes(head)
    with SafeFile(tmp_path, "f") as file:
        refuse_foreign(file)


def test_atomic_writing_leaves_no_partial_file(tmp_path):
    (tmp_path / "f").write_bytes(b"a longer old content")
    write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "file"])
@pytest.mark.parametrize("name", ["f", "f.partial"])
def test_atomic_writing_replaces_what_stands_there(tmp_path, name, kind):
    (tmp_path / "target").write_bytes(b"precious")
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_bytes(b"something longer than the new bytes")
    else:
        path.symlink_to(tmp_path / ("target" if kind == "link" else "absent"))
    write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert (tmp_path / "f").read_bytes() == b"new"
    assert not (tmp_path / "f").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f", "target"]


def test_a_file_is_read_whole_or_not_at_all(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    assert read_file(tmp_path, "f", 5) == b"12345"
    with pytest.raises(LimitError, match="f: file is too long, got 5, expected <= 4"):
        read_file(tmp_path, "f", 4)
    os.truncate(tmp_path / "f", 1 << 40)
    with pytest.raises(LimitError):
        read_file(tmp_path, "f", 1 << 20)


@pytest.mark.parametrize("value", ["out", Path("out"), "ou t\n", "\udcff", "a/../b"])
def test_a_path_of_a_caller_stays_as_it_is(value):
    assert as_path(value, "out") == Path(value)


@pytest.mark.parametrize("value", [3, None, b"out", "", "a\0b", Path("a\0b"), "\ud800"], ids=ascii)
def test_what_is_no_path_is_an_error_that_names_the_argument(value):
    with pytest.raises(UsageError, match=r"^out is no path, got "):
        as_path(value, "out")
