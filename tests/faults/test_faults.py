from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.write.staging import STAGING_NAME, Staging
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.formats.reference import tensor_digest
from tests.sources import bf16, write_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    tensors = {
        f"t{i}": ("BF16", bf16(rng.standard_normal((200, 300))).reshape(200, 300)) for i in range(4)
    }
    return write_source(
        tmp_path_factory.mktemp("source") / "model", tensors, {"model_type": "llama"}
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, source):
    """The bytes of a conversion that nothing disturbed, and how many operations it took."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = _drive(source, out, "none", 0)
    assert done.returncode == 0, done.stderr
    return _bytes(out), int(done.stdout)


def _drive(source, out, fault, at):
    command = [sys.executable, "-m", "tests.faults.driver", str(source), str(out), fault, str(at)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _whole_or_nothing(out, expected):
    """No manifest, or exactly the undisturbed container."""
    if (out / "codecllm.json").exists():
        assert _bytes(out) == expected
        with Container(out) as container:
            for name, record in container.records.items():
                assert tensor_digest(container, name) == record.digest


@pytest.mark.parametrize("fault", ["kill", "EIO", "ENOSPC", "stop"])
def test_a_fault_at_any_operation_leaves_a_whole_container_or_none(
    tmp_path, source, undisturbed, fault
):
    expected, operations = undisturbed
    assert operations > 20

    def one(at):
        out = tmp_path / f"out{at}"
        done = _drive(source, out, fault, at)
        if (
            done.returncode == 0
        ):  # a fault that does no harm: the folder was there already, or the work was done
            assert _bytes(out) == expected, at
        if out.exists():
            _whole_or_nothing(out, expected)
            if fault != "kill" and not (out / "codecllm.json").exists():
                assert not (out / STAGING_NAME).exists(), at
        return out

    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(one, range(1, operations + 1, 1 if fault == "kill" else 3)))
    for out in outs[:: max(1, len(outs) // 4)]:
        if not (out / "codecllm.json").exists():
            leftovers = (
                [path.name for path in out.iterdir() if path.is_file()] if out.exists() else []
            )
            if not leftovers:
                convert(source, out, scheme="lossless", max_shard_bytes=150_000)
                assert _bytes(out) == expected


def test_a_short_write_is_continued(tmp_path, source, undisturbed):
    expected, operations = undisturbed
    for at in range(1, operations, 4):
        done = _drive(source, tmp_path / f"out{at}", "short", at)
        assert done.returncode == 0, done.stderr
        assert _bytes(tmp_path / f"out{at}") == expected


def test_a_file_size_limit_is_an_error_with_nothing_left(tmp_path, source):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    command = [
        sys.executable,
        "-m",
        "codecllm",
        "convert",
        str(source),
        str(tmp_path / "out"),
        "--no-baseline",
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "--scheme", "lossless"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        env=environment,
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_conversions_into_one_folder(tmp_path, source):
    with (
        Staging(tmp_path / "out", force=False),
        pytest.raises(UsageError, match="another conversion"),
    ):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")


def test_leftovers_of_a_killed_conversion_are_replaced(tmp_path, source, undisturbed):
    out = tmp_path / "out"
    (out / STAGING_NAME).mkdir(parents=True)
    (out / STAGING_NAME / "model-00001-of-00009.safetensors").write_bytes(b"half")
    convert(source, out, scheme="lossless", max_shard_bytes=150_000)
    assert _bytes(out) == undisturbed[0]


def test_read_only_target(tmp_path, source):
    if os.geteuid() == 0:
        target = Path("/proc/codecllm-out")
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "codecllm", "convert", str(source), str(target), "--no-baseline"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr


def test_threads_end_with_the_conversion(tmp_path, source):
    before = threading.active_count()
    convert(source, tmp_path / "out", workers=4)
    assert threading.active_count() == before
