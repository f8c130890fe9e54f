"""Signatures of containers: a changed, added or missing file and another key do not pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.errors import (
    CodecLLMError,
    SignatureError,
    UnsupportedEnvironmentError,
    UsageError,
)
from codecllm.verifier import Verdict, verify
from codecllm.verifier.signature import sign
from tests.security.keys import write_keys
from tests.sources import bf16, write_source
from tests.tampering import flip_bit

REASON = "signatures are an extra: pip install 'codecllm[sign]'"


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A container, its signature, and the keys."""
    pytest.importorskip("model_signing", reason=REASON)
    base = tmp_path_factory.mktemp("signed")
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": ("BF16", bf16(rng.standard_normal((60, 64)))) for i in range(2)}
    source = write_source(base / "model", tensors, {"model_type": "llama"})
    (source / "tokenizer_config.json").write_text("{}")
    convert(source, base / "out", scheme="lossless")
    (base / "out" / "README.md").write_text("a card")
    write_keys(base, "key")
    write_keys(base, "other")
    sign(base / "out", base / "key.pem")
    return base


@pytest.fixture
def copy(signed, tmp_path):
    return shutil.copytree(signed, tmp_path / "copy")


def _stage(base, key="key.pub", signature="out.sig"):
    report = verify(
        base / "out",
        level="structure",
        signature=base / signature,
        public_key=base / key,
    )
    return report, report.stages[0]


def test_a_signed_container_holds_and_the_card_may_change(copy):
    (copy / "out" / "README.md").write_text("another card")
    (copy / "out" / ".gitattributes").write_text("")
    report, stage = _stage(copy)
    assert (stage.name, stage.verdict, report.exit_code) == ("signature", Verdict.OK, 0)


def test_no_flipped_bit_of_any_file_holds(copy):
    names = [path.name for path in (copy / "out").iterdir() if path.name != "README.md"]
    assert len(names) == 5
    for name in names:
        path = copy / "out" / name
        for at in (0, path.stat().st_size // 2, path.stat().st_size - 1):
            flip_bit(path, at)
            _, stage = _stage(copy)
            assert stage.verdict is Verdict.FAILED, (name, at)
            assert isinstance(stage.findings[0].error, SignatureError)
            assert name in str(stage.findings[0].error)
            flip_bit(path, at)
    assert _stage(copy)[1].verdict is Verdict.OK


def test_an_added_or_missing_file_does_not_hold(copy):
    for name in ("notes.bin", "added_tokens.json", ".hidden", "sub/evil.py"):
        path = copy / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        _, stage = _stage(copy)
        assert stage.verdict is Verdict.FAILED and name in str(stage.findings[0].error)
        path.unlink()
    (copy / "out" / "sub").rmdir()
    (copy / "out" / "tokenizer_config.json").unlink()
    _, stage = _stage(copy)
    assert "tokenizer_config.json" in str(stage.findings[0].error)


def test_a_resealed_container_with_a_listed_file_does_not_hold(copy, signed):
    """The other container is whole by its own manifest."""
    (copy / "model" / "tokenizer.json").write_text("{}")
    convert(copy / "model", copy / "out", scheme="lossless", force=True)
    report, stage = _stage(copy)
    assert report.stage("structure").verdict is Verdict.OK
    assert stage.verdict is Verdict.FAILED
    assert report.exit_code == 1


def test_another_key_or_another_signature_does_not_hold(copy):
    _, stage = _stage(copy, "other.pub")
    assert stage.verdict is Verdict.FAILED
    bundle = json.loads((copy / "out.sig").read_text())
    envelope = bundle["dsseEnvelope"]
    for damaged in (
        "",
        "[]",
        "{}",
        (copy / "out.sig").read_text()[:-40],
        json.dumps(bundle | {"dsseEnvelope": envelope | {"signatures": []}}),
        json.dumps(bundle | {"dsseEnvelope": envelope | {"payload": envelope["payload"][:-8]}}),
    ):
        (copy / "damaged.sig").write_text(damaged)
        _, stage = _stage(copy, signature="damaged.sig")
        assert stage.verdict is Verdict.FAILED, damaged[:50]
        assert isinstance(stage.findings[0].error, SignatureError)


def test_every_flipped_bit_of_a_signed_statement_does_not_hold(copy):
    """Of the payload and of the signature, in the bundle's base64."""
    bundle = json.loads((copy / "out.sig").read_text())
    envelope = bundle["dsseEnvelope"]
    for text, put in (
        (envelope["payload"], lambda new: envelope | {"payload": new}),
        (
            envelope["signatures"][0]["sig"],
            lambda new: envelope | {"signatures": [envelope["signatures"][0] | {"sig": new}]},
        ),
    ):
        for at in range(0, len(text) - 4, max(1, len(text) // 40)):
            other = "A" if text[at] != "A" else "B"
            damaged = bundle | {"dsseEnvelope": put(text[:at] + other + text[at + 1 :])}
            (copy / "damaged.sig").write_text(json.dumps(damaged))
            assert _stage(copy, signature="damaged.sig")[1].verdict is Verdict.FAILED, at


def test_links_count_as_files_only_in_a_hub_cache(copy):
    shutil.move(copy / "out" / "config.json", copy / "config.json")
    (copy / "out" / "config.json").symlink_to(copy / "config.json")
    assert "symlink" in str(_stage(copy)[1].findings[0].error)
    snapshot = copy / "models--user--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.move(copy / "out", snapshot)
    report = verify(
        snapshot, level="structure", signature=copy / "out.sig", public_key=copy / "key.pub"
    )
    assert report.commit == "0" * 40
    assert report.stages[0].verdict is Verdict.OK, report.stages[0].findings


ADDED = (
    ".git/config",
    ".gitignore",
    ".github/x.py",
    "README.md/evil.json",
    ".gitattributes/evil.json",
    "sub/README.md",
    "sub/.gitattributes",
    "README.MD",
)


def _add(folder, name):
    path = folder / name
    if path.parent != folder and path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(exist_ok=True)
    path.write_text("evil")


@pytest.mark.parametrize("name", ADDED)
def test_no_name_is_left_out_but_the_two_files_of_hosts(copy, name):
    _add(copy / "out", name)
    _, stage = _stage(copy)
    assert stage.verdict is Verdict.FAILED
    assert isinstance(stage.findings[0].error, SignatureError)
    assert name.split("/")[0] in str(stage.findings[0].error)


@pytest.mark.parametrize("name", ADDED[:3])
def test_a_signature_by_the_library_leaves_out_no_more(copy, name):
    """Its defaults leave out files of git, and the signature says so."""
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(private_key=copy / "key.pem")
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=["README.md"]))
    config.sign(copy / "out", copy / "out.sig")
    assert _stage(copy)[1].verdict is Verdict.OK
    _add(copy / "out", name)
    assert name in str(_stage(copy)[1].findings[0].error)


def test_empty_folders_and_links_to_folders_do_not_hold(copy):
    snapshot = copy / "models--user--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(copy / "out", snapshot)
    elsewhere = copy / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.py").write_text("")

    def finding(folder):
        report = verify(
            folder, level="structure", signature=copy / "out.sig", public_key=copy / "key.pub"
        )
        assert report.exit_code == 1
        return str(report.stages[0].findings[0].error)

    for folder in (copy / "out", snapshot):
        (folder / "evil").mkdir()
        assert "evil: the signature does not cover an empty folder" in finding(folder)
        (folder / "evil").rmdir()
        (folder / "evil").symlink_to(elsewhere)
        assert "evil: the signature does not cover a link to a folder" in finding(folder)
        (folder / "evil").unlink()
    (copy / "out" / "README.md").unlink()
    (copy / "out" / "README.md").symlink_to(copy / "key.pem")
    assert "README.md: the signature does not cover a symlink" in finding(copy / "out")


def test_a_signature_is_a_regular_file_of_some_size(copy):
    os.mkfifo(copy / "pipe.sig")
    _, stage = _stage(copy, signature="pipe.sig")
    assert "no regular file" in str(stage.findings[0].error)
    with open(copy / "huge.sig", "wb") as file:
        file.truncate(60 << 30)
    _, stage = _stage(copy, signature="huge.sig")
    assert "too large" in str(stage.findings[0].error)


@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_keys_and_trust_configurations_are_regular_files_of_some_size(copy, kind):
    path = copy / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 60 << 30)
    words = "is (no regular file|too long)"
    with pytest.raises(UsageError, match=f"private key {words}"):
        sign(copy / "out", path)
    with pytest.raises(UsageError, match=f"public key {words}"):
        _stage(copy, kind)
    identity = {"identity": "a", "issuer": "b", "trust_config": path}
    with pytest.raises(UsageError, match=f"trust configuration {words}"):
        verify(copy / "out", level="structure", signature=copy / "out.sig", **identity)


def test_sign_writes_through_no_link(copy):
    (copy / "precious").write_text("precious")
    (copy / "out.sig").unlink()
    for ending in ("", ".partial", ".unsigned"):
        (copy / f"out.sig{ending}").symlink_to(copy / "precious")
    sign(copy / "out", copy / "key.pem")
    assert (copy / "precious").read_text() == "precious"
    assert not (copy / "out.sig").is_symlink()
    assert not list(copy.glob(".codecllm-*"))
    assert _stage(copy)[1].verdict is Verdict.OK


def test_hidden_files_are_not_signed(copy):
    (copy / "out" / ".gitattributes").write_text("")
    for name in (".git/config", ".hidden", "sub/.hidden"):
        _add(copy / "out", name)
        with pytest.raises(UsageError, match=f"would be signed with it.*{name.split('/')[0]}"):
            sign(copy / "out", copy / "key.pem")
        shutil.rmtree(copy / "out" / name.split("/")[0], ignore_errors=True)
        (copy / "out" / name).unlink(missing_ok=True)
    sign(copy / "out", copy / "key.pem")


def test_an_encrypted_key_needs_its_password(copy):
    write_keys(copy, "locked", b"secret")
    for password in (None, "wrong"):
        with pytest.raises(UsageError, match="password"):
            sign(copy / "out", copy / "locked.pem", copy / "locked.sig", password=password)
    assert not (copy / "locked.sig").exists()
    path = sign(copy / "out", copy / "locked.pem", copy / "locked.sig", password="secret")
    assert _stage(copy, "locked.pub", path.name)[1].verdict is Verdict.OK


def test_what_is_not_signed(copy):
    out, key = copy / "out", copy / "key.pem"
    with pytest.raises(UsageError, match="outside of containers"):
        sign(out, key, out / "out.sig")
    with pytest.raises(UsageError, match="private key"):
        sign(out, copy / "key.pub")
    with pytest.raises(FileNotFoundError):
        sign(out, copy / "absent.pem")
    (copy / "loop").symlink_to("loop")
    with pytest.raises(CodecLLMError, match="loop"):
        sign(copy / "loop", key)
    (out / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        sign(out, key)
    (out / "notes.txt").unlink()
    flip_bit(next(out.glob("*.safetensors")), 2000)
    with pytest.raises(CodecLLMError, match="safetensors"):
        sign(out, key)


def test_arguments_of_verify(copy):
    with pytest.raises(UsageError, match="public key"):
        verify(copy / "out", signature=copy / "out.sig")
    with pytest.raises(UsageError, match="public key"):
        verify(copy / "out", public_key=copy / "key.pub")
    with pytest.raises(UsageError, match="public key"):
        _stage(copy, "key.pem")
    with pytest.raises(FileNotFoundError):
        _stage(copy, signature="absent.sig")


def test_the_commands(copy):
    def run(*arguments):
        command = [sys.executable, "-m", "codecllm", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("sign", copy / "out", "--private-key", copy / "key.pem", "--json")
    assert done.returncode == 0, done.stderr
    path = json.loads(done.stdout)["signature"]
    assert path == str(copy / "out.sig")
    verify_it = ["verify", copy / "out", "--level", "structure", "--signature", path]
    done = run(*verify_it, "--public-key", copy / "key.pub")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "signature" in done.stdout
    done = run(*verify_it, "--public-key", copy / "other.pub")
    assert done.returncode == 1
    assert run(*verify_it).returncode == 2
    assert run(*verify_it, "--public-key", copy / "absent").returncode == 4


def test_without_the_extra_one_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (
        lambda: sign(tmp_path, tmp_path / "key.pem"),
        lambda: verify(tmp_path, signature="a.sig", public_key="key.pub"),
    ):
        with pytest.raises(UnsupportedEnvironmentError, match=r"codecllm\[sign\]"):
            call()
