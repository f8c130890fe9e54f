"""Shards are opened as needed.

Few descriptors, the same bytes, and never a file that was replaced meanwhile.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, TruncatedError
from codecllm.formats.open_files import OPEN_FILES, OpenFiles
from tests.sources import bf16, write_source

SHARDS = 100


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    base = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    tensors = {f"t{i:03d}": ("BF16", bf16(rng.standard_normal((8, 64)))) for i in range(SHARDS)}
    source = write_source(base / "source", tensors, {"model_type": "llama"})
    convert(source, base / "out", scheme="lossless", max_shard_bytes=1)
    return base / "out"


def _descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_a_container_of_many_shards_keeps_few_open(container):
    before = _descriptors()
    with Container(container) as opened:
        assert len(opened.manifest.shards) == SHARDS
        tensors = [opened.tensor(name) for name in opened.records]
        assert _descriptors() - before <= OPEN_FILES
        for tensor in tensors:
            tensor.file.read(0, 8)
        assert _descriptors() - before <= OPEN_FILES
    assert _descriptors() == before
    with pytest.raises(OSError, match="closed"):
        tensors[0].file.read(0, 1)


def test_commands_work_with_fewer_descriptors_than_shards(container):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))

    done = subprocess.run(
        [sys.executable, "-m", "codecllm", "verify", str(container)],
        capture_output=True, text=True, check=False, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_threads_that_take_turns_at_few_descriptors_read_the_right_files(tmp_path):
    names = [f"f{i}" for i in range(40)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([number]) * 1000)
    pool = OpenFiles(tmp_path, most=3)
    files = [pool.open(name) for name in names]

    def read(seed):
        rng = random.Random(seed)
        for _ in range(500):
            number = rng.randrange(len(files))
            assert files[number].read(rng.randrange(900), 100) == bytes([number]) * 100

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read, range(8)))
    for file in files:
        file.close()
        file.close()


def test_a_file_that_was_replaced_or_deleted_between_two_reads_is_refused(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"old" * 10)
    pool = OpenFiles(tmp_path, most=1)
    first, second, third = (pool.open(name) for name in ("a", "b", "c"))
    (tmp_path / "a").write_bytes(b"new" * 10)
    (tmp_path / "b").unlink()
    with pytest.raises(ChecksumError, match="changed while its container was open") as caught:
        first.read(0, 3)
    assert caught.value.file == "a"
    with pytest.raises(TruncatedError, match="missing"):
        second.read(0, 3)
    assert third.read(0, 3) == b"old"
