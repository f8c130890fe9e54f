"""Text files, keys and settings that a user names are read within bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from codecllm.formats.arguments.inputs import TEXT_BYTES, check_input, read_user_text
from codecllm.formats.errors import UsageError


def _fifo(path):
    os.mkfifo(path)
    return path


def _long(path):
    path.touch()
    os.truncate(path, TEXT_BYTES + 1)
    return path


def _bytes(path):
    path.write_bytes(b"a\xff")
    return path


NO_TEXTS = {
    "a device": (lambda _: "/dev/zero", "no regular file"),
    "a FIFO": (_fifo, "no regular file"),
    "a folder": (lambda path: path.parent, "no regular file"),
    "a long file": (_long, f"too long.*at most {TEXT_BYTES} bytes"),
    "no file": (lambda path: path, r"cannot be read \(No such file"),
    "a name beyond the system's": (lambda path: path / ("a" * 300), "cannot be read"),
    "bytes that are not UTF-8": (_bytes, "not UTF-8"),
}


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_what_is_no_text_is_one_error(tmp_path, kind):
    make, words = NO_TEXTS[kind]
    with pytest.raises(UsageError, match=words):
        read_user_text(make(tmp_path / "text"))


def test_a_text_is_read_as_python_reads_it(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\u00e4\r\nb\rc\n".encode())
    assert read_user_text(path) == path.read_text(encoding="utf-8") == "\u00e4\nb\nc\n"
    (tmp_path / "link").symlink_to(path)
    assert read_user_text(tmp_path / "link") == read_user_text(path)


@pytest.mark.parametrize("kind", ["a device", "a FIFO", "a folder", "a long file"])
def test_what_is_no_key_is_one_error(tmp_path, kind):
    make, words = NO_TEXTS[kind]
    with pytest.raises(UsageError, match=f"the key is {words}"):
        check_input(Path(make(tmp_path / "key")), "the key", TEXT_BYTES)


def test_a_key_may_be_a_link_to_a_file_of_the_longest_length(tmp_path):
    (tmp_path / "key").write_bytes(bytes(8))
    (tmp_path / "link").symlink_to(tmp_path / "key")
    check_input(tmp_path / "link", "the key", 8)
    with pytest.raises(FileNotFoundError):
        check_input(tmp_path / "absent", "the key", 8)
