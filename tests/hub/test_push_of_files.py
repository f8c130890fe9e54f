"""A push publishes regular files of the container's folder, and writes only its README.md there."""

from __future__ import annotations

import os
import shutil

import pytest

from codecllm.formats.container import Container
from codecllm.formats.errors import LimitError, UnsafePathError
from codecllm.hub import upload_container
from codecllm.hub.upload import CARD_BYTES
from codecllm.model_card import MARKER
from codecllm.publishing import push

REPO = "user/tiny-codecllm-int8"


def _refused(hub, container, error, words):
    with pytest.raises(error, match=words) as caught:
        push(container, REPO, level="structure")
    assert REPO not in hub.repos
    assert not [exchange for exchange in hub.log if exchange.method != "GET"]
    return caught.value


@pytest.mark.parametrize("text", ["a secret", MARKER])
@pytest.mark.parametrize("absent", [False, True])
def test_a_readme_that_is_a_link_is_not_published(hub, container, tmp_path, text, absent):
    secret = tmp_path / "id_rsa"
    if not absent:
        secret.write_text(text)
    (container / "README.md").symlink_to(secret)
    assert _refused(hub, container, UnsafePathError, "a symbolic link").file == "README.md"
    assert (container / "README.md").is_symlink()
    assert secret.exists() != absent


def test_a_partial_readme_that_is_a_link_is_not_written_through(hub, container, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (container / "README.md.partial").symlink_to(precious)
    assert push(container, REPO, level="structure").card
    assert precious.read_text() == "precious"


def test_a_readme_that_is_a_pipe_is_refused(hub, container):
    os.mkfifo(container / "README.md")
    _refused(hub, container, UnsafePathError, "not a regular file")


def test_a_long_readme_is_refused_unread(hub, container):
    (container / "README.md").touch()
    os.truncate(container / "README.md", CARD_BYTES + 1)
    _refused(hub, container, LimitError, "file is too long")
    os.truncate(container / "README.md", 1 << 42)
    _refused(hub, container, LimitError, "file is too long")


@pytest.mark.parametrize("name", ["codecllm.json", "config.json"])
def test_a_file_that_became_a_link_behind_the_verification(hub, container, tmp_path, name):
    with Container(container) as opened:
        manifest = opened.manifest
    shutil.move(container / name, tmp_path / "elsewhere")
    (container / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match="a symbolic link"):
        upload_container(container, manifest, REPO, message="m", card_marker=MARKER)
    assert REPO not in hub.repos
