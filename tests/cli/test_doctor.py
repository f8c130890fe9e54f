"""`codecllm doctor` tests every decoder of this machine, or says why it is absent."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from codecllm import doctor
from codecllm.doctor import DecoderFinding, examine
from codecllm.formats.codecs import native
from codecllm.loader import stream

pytestmark = pytest.mark.gpu_too


def _run(*arguments):
    command = [sys.executable, "-m", "codecllm", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_every_decoder_is_tested_or_says_why_not():
    done = _run("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert found["versions"]["torch"] == version("torch")
    states = {(finding["device"], finding["decoder"]): finding for finding in found["decoders"]}
    for decoder in ("reference, zstd", "reference, rans", "loader, zstd", "loader, rans"):
        assert states["cpu", decoder]["state"] == "works"
    if not torch.cuda.is_available():
        assert states["gpu", "nvcomp"] == {
            "device": "gpu",
            "decoder": "nvcomp",
            "state": "absent",
            "detail": "torch finds no GPU",
        }
        assert states["gpu", "triton"]["state"] == "absent"


def test_text_has_a_line_for_each_decoder():
    done = _run()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("torch ") for line in lines)
    assert any(line.startswith("works") and "cpu: loader, rans" in line for line in lines)


def test_wrong_bits_are_a_failure(monkeypatch):
    decode = stream.stream_tensors

    def broken(container):
        for record, tensor in decode(container):
            yield record, tensor + 1 if record.name == "rows.weight" else tensor

    monkeypatch.setattr(stream, "stream_tensors", broken)
    found = examine()
    assert not found.ok
    wrong = [finding for finding in found.findings if finding.state == "wrong"]
    assert [finding.decoder for finding in wrong] == ["loader, zstd", "loader, rans"]
    assert "'rows.weight'" in wrong[0].detail and "other bits than the reference" in wrong[0].detail


def test_a_decoder_that_raises_is_a_failure_too():
    def test():
        raise RuntimeError("out of luck")

    assert doctor._finding("cpu", "x", "y", test) == DecoderFinding(
        "cpu", "x", "wrong", "y: out of luck"
    )
    with pytest.raises(KeyboardInterrupt):
        doctor._finding("cpu", "x", "y", _interrupt)


def _interrupt():
    raise KeyboardInterrupt


def test_the_native_core_is_tested_or_says_how_to_get_it():
    found = {finding.decoder: finding for finding in examine().findings}["native core"]
    assert found.state == ("absent" if native.core is None else "works")
    assert "kernels" in found.detail or native.HOW_TO_GET in found.detail or "=0" in found.detail


def test_without_the_native_core_the_doctor_says_so(monkeypatch):
    monkeypatch.setattr(native, "core", None)
    found = {finding.decoder: finding for finding in examine().findings}["native core"]
    assert found.state == "absent"
