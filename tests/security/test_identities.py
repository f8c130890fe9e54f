"""Signatures by an identity: the certificate, its issuer, its log and every file must hold.

No server is asked: the trust configuration is a file, and its authority is made on the spot.
"""

from __future__ import annotations

import base64
import copy
import json
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.errors import SignatureError, UnsupportedEnvironmentError, UsageError
from codecllm.verifier import Verdict, verify
from codecllm.verifier.signature import sign
from tests.sources import bf16, write_source
from tests.tampering import flip_bit

pytest.importorskip("model_signing", reason="signatures are an extra: pip install 'codecllm[sign]'")

from tests.security.identities import Authority
from tests.security.keys import write_keys

WHO, ISSUER = "signer@example.org", "https://issuer.example"


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A container, the signature of an identity, and two trust configurations."""
    base = tmp_path_factory.mktemp("identities")
    tensors = {"t": ("BF16", bf16(np.random.default_rng(0).standard_normal((60, 64))))}
    source = write_source(base / "model", tensors, {"model_type": "llama"})
    convert(source, base / "out", scheme="lossless")
    write_keys(base, "key")
    # What is signed is the same statement, whoever signs it.
    sign(base / "out", base / "key.pem", base / "key.sig")
    envelope = json.loads((base / "key.sig").read_text())["dsseEnvelope"]
    statement = base64.b64decode(envelope["payload"])
    authority = Authority()
    bundle = authority.sign(statement, envelope["payloadType"], WHO, ISSUER)
    (base / "out.sig").write_text(json.dumps(bundle))
    (base / "trust.json").write_text(json.dumps(authority.trust()))
    (base / "other.json").write_text(json.dumps(Authority().trust()))
    return base


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _stage(base, **options):
    given = {
        "signature": base / "out.sig", "identity": WHO, "issuer": ISSUER,
        "trust_config": base / "trust.json",
    }  # fmt: skip
    report = verify(base / "out", level="structure", **(given | options))
    return report.stages[0]


def test_the_identity_that_signed_holds(signed):
    stage = _stage(signed)
    assert (stage.name, stage.verdict) == ("signature", Verdict.OK)
    assert stage.summary == f"every file is as it was signed by {WHO} ({ISSUER})"


@pytest.mark.parametrize(
    "options", [{"identity": "other@example.org"}, {"issuer": "https://other.example"}]
)
def test_another_identity_or_issuer_does_not_hold(signed, options):
    stage = _stage(signed, **options)
    assert stage.verdict is Verdict.FAILED
    assert isinstance(stage.findings[0].error, SignatureError)


def test_another_authority_does_not_hold(signed):
    stage = _stage(signed, trust_config=signed / "other.json")
    assert isinstance(stage.findings[0].error, SignatureError)


def test_a_changed_file_does_not_hold(signed, tmp_path):
    base = shutil.copytree(signed, tmp_path / "copy")
    for path in sorted((base / "out").iterdir()):
        flip_bit(path, path.stat().st_size // 2)
        error = _stage(base).findings[0].error
        assert isinstance(error, SignatureError) and path.name in str(error)
        flip_bit(path, path.stat().st_size // 2)
    assert _stage(base).verdict is Verdict.OK


def _texts(value, path=()):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _texts(inner, (*path, key))
    else:
        yield path


def test_no_changed_field_of_the_bundle_holds(signed, tmp_path):
    bundle = json.loads((signed / "out.sig").read_text())
    changed = 0
    for path in _texts(bundle):
        other = copy.deepcopy(bundle)
        *parents, last = path
        place = other
        for key in parents:
            place = place[key]
        text = place[last]
        # One character in the middle of a signature, a digest, a certificate, a number, a name.
        middle = len(text) // 2
        place[last] = text[:middle] + ("B" if text[middle] != "B" else "C") + text[middle + 1 :]
        (tmp_path / "changed.sig").write_text(json.dumps(other))
        stage = _stage(signed, signature=tmp_path / "changed.sig")
        assert stage.verdict is Verdict.FAILED, path
        assert isinstance(stage.findings[0].error, SignatureError), path
        changed += 1
    assert changed >= 14


def test_a_signature_by_a_key_is_none_by_an_identity(signed):
    assert isinstance(
        _stage(signed, signature=signed / "key.sig").findings[0].error, SignatureError
    )


@pytest.mark.parametrize(
    "options",
    [
        {"issuer": None},
        {"identity": None},
        {"identity": None, "issuer": None},
        {"public_key": "key.pub"},
        {"signature": None},
    ],
)
def test_halves_of_a_signer_are_wrong_usage(signed, options):
    with pytest.raises(UsageError):
        _stage(signed, **options)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"mediaType": 1}'])
def test_a_damaged_trust_configuration_is_wrong_usage(signed, tmp_path, text):
    (tmp_path / "trust.json").write_text(text)
    with pytest.raises(UsageError, match="not a trust configuration"):
        _stage(signed, trust_config=tmp_path / "trust.json")


def test_without_a_file_and_without_network_it_is_one_clear_error(signed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UnsupportedEnvironmentError, match="cannot be fetched"):
        _stage(signed, trust_config=None)


def test_the_command_line_takes_an_identity(signed):
    arguments = [
        "verify", "out", "--level", "structure", "--signature", "out.sig", "--identity", WHO,
        "--issuer", ISSUER, "--trust-config", "trust.json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "codecllm", *arguments],
        cwd=signed, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert WHO in done.stdout
