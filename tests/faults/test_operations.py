"""A fault at any operation of a conversion leaves a whole container or none, and no litter."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from codecllm.converter.write.staging import STAGING_NAME
from codecllm.formats.container import Container
from codecllm.formats.reference import tensor_digest
from tests.faults.shim import FAULTS, Server, compile_shim
from tests.sources import bf16, write_source

STOPPED = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGINT twice": 130}
OWN_FILES = {"README.md": b"a card", "notes.txt": b"of the user"}
# Its class has other tensors than the source: the container gets a load report too.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1,
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip


STRIDES = {"ENOSPC": 12, "kill": 12}


def _steps(fault, operations):
    """A part of the operations, another one for each fault; all with CODECLLM_ALL_FAULTS."""
    if "CODECLLM_ALL_FAULTS" in os.environ:
        return range(1, operations + 1)
    stride = STRIDES.get(fault, 24)
    return range(1 + FAULTS.index(fault) % stride, operations + 1, stride)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("shim")
    running = Server(compile_shim(scratch), scratch)
    yield running
    running.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two shards and, as sentence-transformers have it, a side file in a subfolder."""
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": ("BF16", bf16(rng.standard_normal((60, 64)))) for i in range(2)}
    base = tmp_path_factory.mktemp("source") / "model"
    folder = write_source(base, tensors, CONFIG)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def _command(source, out, *more):
    options = ["--no-baseline", "--scheme", "lossless", "--max-shard-size", "7KB", "--workers", "1"]
    return ["convert", source, out, *options, *more]


def _bytes(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(server, source, tmp_path_factory):
    """The bytes of a conversion that nothing disturbed, and its operations."""
    base = tmp_path_factory.mktemp("undisturbed")
    done = server.run(_command(source, base / "out"), base)
    assert done.code == 0, done.text
    with Container(base / "out") as container:
        assert len(container.manifest.shards) == 2
        assert container.manifest.file("load_report.json") is not None
        for name, record in container.records.items():
            assert tensor_digest(container, name) == record.digest
    return _bytes(base / "out"), done.count


@pytest.fixture(scope="module")
def old(server, source, tmp_path_factory):
    """Another container with files of the user, and the operations of its replacement."""
    base = tmp_path_factory.mktemp("old")
    (source.parent / "other").mkdir()
    other = shutil.copytree(source, source.parent / "other" / "model")
    (other / "2_Dense").mkdir()
    (other / "2_Dense" / "config.json").write_text("[]")
    done = server.run(_command(other, base / "out", "--codec", "rans"), base)
    assert done.code == 0, done.text
    for name, data in OWN_FILES.items():
        (base / "out" / name).write_bytes(data)
    copy = shutil.copytree(base / "out", base / "copy" / "out")
    replaced = server.run(_command(source, copy, "--force"), copy.parent)
    assert replaced.code == 0, replaced.text
    return base / "out", _bytes(base / "out"), replaced.count


def _placed(out):
    """Everything in the output folder but the staging folder."""
    files = _bytes(out) if out.exists() else {}
    return {name: data for name, data in files.items() if not name.startswith(STAGING_NAME)}


def _check_message(done, fault, whole):
    assert "Traceback" not in done.text
    if fault in STOPPED:
        assert done.code == STOPPED[fault], done.text
        # A signal that is handled behind the last operation finds nothing to say of the output.
        assert whole or "is complete" not in done.text, done.text
    elif not whole:
        assert done.code == 4, done.text


def _check_new(server, source, expected, base, fault, at):
    out = base / "deep" / "out"
    done = server.run(_command(source, out), base, fault, at)
    found = _placed(out)
    whole = found == expected
    if done.code == 0:
        assert whole, (fault, at, sorted(found))
    elif fault != "kill":
        _check_message(done, fault, whole)
        if "could not be removed" not in done.text:
            assert whole or not (base / "deep").exists(), (
                fault,
                at,
                sorted(found),
            )
            assert not (out / STAGING_NAME).exists(), (fault, at)
    elif not whole:
        assert "codecllm.json" not in found, (fault, at)
    if whole:
        refused = server.run(_command(source, out), base)
        assert refused.code == 2, refused.text
        assert _bytes(out) == expected, (fault, at)
    else:
        again = server.run(_command(source, out), base)
        assert again.code == 0, (fault, at, again.text)
        assert _bytes(out) == expected, (fault, at)


def _check_replaced(server, source, expected, old, base, fault, at):
    before = _bytes(old)
    after = expected | OWN_FILES
    out = shutil.copytree(old, base / "out")
    done = server.run(_command(source, out, "--force"), base, fault, at)
    found = _placed(out)
    assert fault == "kill" or found in (before, after) or "could not be" in done.text, (fault, at)
    if fault not in ("kill", "none") and done.code:
        _check_message(done, fault, found == after)
    if found != after:
        refused = server.run(_command(source, out), base)
        assert refused.code == 2, (fault, at, refused.text)
        assert "--force replaces it" in refused.text
        assert _placed(out) == before, (fault, at)
        assert server.run(_command(source, out, "--force"), base).code == 0, (fault, at)
        assert _bytes(out) == after, (fault, at)


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "short", "kill", *STOPPED, "dead"])
def test_a_new_container_is_whole_or_not_there(server, source, undisturbed, tmp_path, fault):
    expected, operations = undisturbed
    assert operations > 30
    for at in _steps(fault, operations):
        base = tmp_path / str(at)
        base.mkdir()
        _check_new(server, source, expected, base, fault, at)
        shutil.rmtree(base)


@pytest.mark.parametrize("fault", ["ENOSPC", "kill", "SIGTERM", "SIGINT twice", "dead"])
def test_a_replaced_container_is_the_old_one_or_the_new_one(
    server, source, undisturbed, old, tmp_path, fault
):
    expected, _ = undisturbed
    folder, _, operations = old
    for at in _steps(fault, operations):
        base = tmp_path / str(at)
        base.mkdir()
        _check_replaced(server, source, expected, folder, base, fault, at)
        shutil.rmtree(base)
