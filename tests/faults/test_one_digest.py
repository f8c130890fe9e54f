"""A conversion gives the same container whatever surrounds the process that makes it."""

from __future__ import annotations

import json
import locale
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.sources import bf16, write_source

# Converts the source by several schemes and codecs; prints the digest of each manifest, which
# holds the digest of every file, and what the process is like.
CONVERTS = """
import json, locale, os, sys
locale.setlocale(locale.LC_ALL, "")
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
from codecllm.converter import convert
from codecllm.formats.codecs import native
source, out, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
digests = []
for number, options in enumerate((
    {"scheme": "int8"}, {"scheme": "int8", "codec": "rans"},
    {"scheme": "lossless"}, {"scheme": "lossless", "codec": "rans"},
)):
    report = convert(source, f"{out}/{number}", workers=workers, max_shard_bytes=100_000, **options)
    digests.append(report.manifest_sha256)
print(json.dumps({
    "digests": digests, "native": native.core is not None, "asserts": __debug__,
    "dispatched": " ".join(n for n in __cpu_dispatch__ if __cpu_features__[n]),
    "comma": locale.localeconv()["decimal_point"],
}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(5)
    tensors = {
        f"model.layers.{number}.w.weight": ("BF16", bf16(rng.standard_normal((120, 200 + number))))
        for number in range(3)
    }
    tensors["long"] = ("F32", rng.standard_normal((3, 20_001)).astype(np.float32))
    tensors["norm"] = ("F32", np.ones(99, np.float32))
    return write_source(tmp_path_factory.mktemp("source") / "model", tensors, {"model_type": "x"})


def _convert(source, out, workers=2, flags=(), **environment):
    done = subprocess.run(
        [sys.executable, *flags, "-c", CONVERTS, str(source), str(out), str(workers)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def usual(source, tmp_path_factory):
    return _convert(source, tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize("workers", [1, 7, 16])
def test_workers(source, usual, tmp_path, workers):
    assert _convert(source, tmp_path, workers)["digests"] == usual["digests"]


def test_another_folder_with_other_times(source, usual, tmp_path):
    moved = shutil.copytree(source, tmp_path / "ein anderer Örtchen" / "model")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    assert _convert(moved, tmp_path / "out")["digests"] == usual["digests"]


@pytest.mark.parametrize("seed", ["0", "1", "4294967295"])
def test_hash_seeds(source, usual, tmp_path, seed):
    assert _convert(source, tmp_path, PYTHONHASHSEED=seed)["digests"] == usual["digests"]


def test_without_assertions(source, usual, tmp_path):
    result = _convert(source, tmp_path, flags=["-OO"])
    assert not result["asserts"]
    assert result["digests"] == usual["digests"]


@pytest.mark.parametrize("name", ["C", "de_DE.UTF-8", "tr_TR.UTF-8"])
def test_locales(source, usual, tmp_path, name):
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, name)
    except locale.Error:
        pytest.skip(f"this system has no locale {name}")
    finally:
        locale.setlocale(locale.LC_ALL, before)
    result = _convert(source, tmp_path, LC_ALL=name, LANG=name)
    assert result["comma"] == ("." if name == "C" else ",")
    assert result["digests"] == usual["digests"]


def test_numpy_without_avx(source, usual, tmp_path):
    if not usual["dispatched"]:
        pytest.skip("numpy has no code for more than the least of this processor")
    result = _convert(source, tmp_path, NPY_DISABLE_CPU_FEATURES=usual["dispatched"])
    assert result["dispatched"] == ""
    assert result["digests"] == usual["digests"]


def test_without_the_native_core(source, usual, tmp_path):
    if not usual["native"]:
        pytest.skip("the native core is not built here")
    result = _convert(source, tmp_path, CODECLLM_NATIVE="0")
    assert not result["native"]
    assert result["digests"] == usual["digests"]
