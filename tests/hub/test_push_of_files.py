"""A push publishes regular files of the container's folder, and writes only its README.md there."""

from __future__ import annotations

import os
import shutil

import pytest
from huggingface_hub import ModelCard

from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, LayoutError, LimitError, UnsafePathError
from codecllm.hub import upload_container
from codecllm.hub.upload import CARD_BYTES
from codecllm.model_card import MARKER
from codecllm.publishing import push
from tests import hub_endpoints
from tests.tampering import add_listed

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
        manifest, sha256 = opened.manifest, opened.manifest_sha256
    shutil.move(container / name, tmp_path / "elsewhere")
    (container / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match="a symbolic link"):
        upload_container(container, manifest, sha256, REPO, message="m", card_marker=MARKER)
    assert REPO not in hub.repos


def _on_upload(change):
    def tell(text):
        if text.startswith("uploading"):
            change()

    return tell


@pytest.mark.parametrize("name", ["codecllm.json", "config.json", "generation_config.json"])
def test_a_file_that_changed_behind_the_verification(hub, container, name):
    """Its size stays, so that only its content tells."""

    def change():
        (container / name).write_bytes((container / name).read_bytes().swapcase())

    with pytest.raises(ChecksumError, match="changed while it was uploaded") as caught:
        push(container, REPO, level="structure", on_stage=_on_upload(change))
    assert caught.value.file == name


def test_a_file_that_changed_for_the_upload_alone(hub, container, monkeypatch):
    path, stored = container / "config.json", hub.store
    content = path.read_bytes()
    monkeypatch.setattr(
        hub, "store", lambda name, data: stored(name, data.replace(b'"llama"', b'"LLAMA"'))
    )
    with pytest.raises(LayoutError, match="is not the one that was uploaded") as caught:
        push(container, REPO, level="structure")
    assert caught.value.file == "config.json"
    assert path.read_bytes() == content


def test_files_of_the_former_container_go_and_others_stay(hub, container, lossless):
    names = ("chat_template.jinja", "sub/extra[1].json", "own.py")
    for name in names:
        add_listed(container, name, b"OLD")
    push(container, REPO, level="structure")
    repo = hub.repos[REPO]
    assert repo.commits[repo.refs["main"]].keys() >= {*names}
    contents = {"notes.md": b"x", "sub/b.json": b"{}", "lora/adapter_model.safetensors": b"y"}
    others = {name: hub.store(name, data) for name, data in contents.items()}
    hub.commit(repo, repo.commits[repo.refs["main"]] | others, "more", "main")
    push(lossless, REPO, level="structure")
    kept = {path.name for path in lossless.iterdir()} | others.keys() | {".gitattributes"}
    assert repo.commits[repo.refs["main"]].keys() == kept


@pytest.mark.parametrize("manifest", [b"", b"{}", b"no JSON"])
def test_a_repository_whose_manifest_is_damaged_is_replaced(hub, container, manifest):
    hub.add_repo(REPO, {"codecllm.json": manifest, "model-00009-of-00009.safetensors": b"x"})
    push(container, REPO, level="structure")
    repo = hub.repos[REPO]
    kept = {path.name for path in container.iterdir()}
    assert repo.commits[repo.refs["main"]].keys() == kept


@pytest.mark.parametrize("value", [5, True, ["a"], {"a": "b"}, 1.5])
@pytest.mark.parametrize("field", ["license_link", "license_name", "license", "language"])
def test_a_card_of_a_base_may_hold_anything(hub, container, field, value):
    hub.add_repo("base/model", card_data={"license": "other", field: value})
    push(container, REPO, level="structure", base_model="base/model")
    card = ModelCard((container / "README.md").read_text()).data.to_dict()
    lists = field in ("license", "language") and value == ["a"]
    assert card.get(field) == (value if lists else None)


def test_a_card_that_the_hub_does_not_take_is_told(hub, container, lossless, monkeypatch):
    """The Hub passes over files that a .gitignore of the repository names."""
    answer = hub_endpoints.Handler._json

    def ignoring(self, value, *arguments, **options):
        for file in value.get("files", []) if isinstance(value, dict) else []:
            file["shouldIgnore"] = file["path"] == "README.md"
        answer(self, value, *arguments, **options)

    push(lossless, "user/other", level="structure")
    monkeypatch.setattr(hub_endpoints.Handler, "_json", ignoring)
    for repo in (REPO, "user/other"):  # without a card, and with one of another container
        report = push(container, repo, level="structure")
        assert not report.card
        assert any("has none or another" in text for text in report.warnings)
        found = hub.repos[repo]
        held = len(found.commits[found.refs["main"]].keys() - {".gitattributes", "README.md"})
        assert report.files == held
