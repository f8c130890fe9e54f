"""The native core under ASan and UBSan, on mutated inputs of every entry point."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
FLAGS = (
    "-std=gnu11",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-DPIECE=48",  # short inputs come beyond these
    "-DCOUNTED_EXACTLY=200",
)
CORE = (
    "check",
    "dispatch",
    "kernels_avx2",
    "kernels_avx512",
    "kernels_neon",
    "kernels_portable",
    "pack",
    "rans",
    "run",
    "xxh3",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Builds the mutating driver with the sanitizers."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = tmp_path_factory.mktemp("native") / "mutate"
    sources = [NATIVE / f"{name}.c" for name in CORE]
    sources += [NATIVE / "fuzz" / "targets.c", NATIVE / "fuzz" / "mutate.c"]
    command = [compiler, *FLAGS, f"-I{NATIVE}", *map(str, sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize("seed", [1, 2])
def test_no_sanitizer_finds_a_fault(program, seed):
    done = subprocess.run(
        [str(program), "30000", str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30000 executions" in done.stdout
