"""A conversion gives the same bytes with any workers, folder, process and locale."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from codecllm.converter import convert
from tests.sources import bf16, write_sharded_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    shards = [
        {
            f"s{shard}.{i}.weight": (
                "BF16",
                bf16(rng.standard_normal((300, 1000 + i))).reshape(300, 1000 + i),
            )
            for i in range(5)
        }
        for shard in range(3)
    ]
    shards[0]["long"] = ("F32", rng.standard_normal((3, 400_001)).astype(np.float32))
    shards[1]["tied"] = shards[0]["s0.1.weight"]
    shards[2]["norm"] = ("F32", np.ones(99, np.float32))
    folder = write_sharded_source(tmp_path_factory.mktemp("source") / "model", shards)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_same_bytes_from_any_number_of_workers_and_any_folder(tmp_path, source, scheme, codec):
    results = []
    for workers in (1, 2, 8):
        out = tmp_path / f"out{workers}"
        convert(source, out, scheme=scheme, codec=codec, workers=workers, max_shard_bytes=2_000_000)
        results.append(_bytes(out))
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(source, moved)
    convert(moved, tmp_path / "moved", scheme=scheme, codec=codec, max_shard_bytes=2_000_000)
    results.append(_bytes(tmp_path / "moved"))
    assert len(results[0]) > 4
    assert all(result == results[0] for result in results)


def test_numbers_of_numpy_give_the_bytes_of_their_values(tmp_path, source):
    options = {"chunk_kib": 64, "max_shard_bytes": 2_000_000, "workers": 2}
    convert(source, tmp_path / "own", **options)
    # Its own sizes would pass 32 bits, and the manifest has no such numbers.
    convert(source, tmp_path / "numpy", **{k: np.int32(v) for k, v in options.items()})
    assert _bytes(tmp_path / "own") == _bytes(tmp_path / "numpy")


def test_same_bytes_in_another_process_locale_and_folder(tmp_path, source):
    results = []
    for number, extra in enumerate(
        ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "Asia/Tokyo"})
    ):
        out, cwd = tmp_path / f"out{number}", tmp_path / f"cwd{number}"
        cwd.mkdir()
        flags = ["-O"] if number else []
        command = [
            sys.executable,
            *flags,
            "-m",
            "codecllm",
            "convert",
            str(source),
            str(out),
            "--no-baseline",
        ]
        subprocess.run(
            command, check=True, cwd=cwd, env={**os.environ, **extra}, capture_output=True
        )
        results.append(_bytes(out))
    assert results[0] == results[1]


def test_no_path_and_no_time_in_the_output(tmp_path, source):
    convert(source, tmp_path / "out")
    for name, data in _bytes(tmp_path / "out").items():
        assert str(tmp_path).encode() not in data, name
        assert str(source).encode() not in data, name
