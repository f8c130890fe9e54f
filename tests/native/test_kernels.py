"""All sets of kernels give the same bits, here and, where an emulator is, on AArch64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.test_sanitizers import CORE, NATIVE

ROUNDS = "300"
FLAGS = ("-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")


def build(compiler: str, program: Path, *options: str) -> Path:
    """Builds the program that compares kernels."""
    sources = [Path(__file__).with_name("equal_kernels.c")]
    sources += [NATIVE / f"{name}.c" for name in CORE]
    command = [compiler, *FLAGS, *options, f"-I{NATIVE}", *map(str, sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return program


def run(*command: object) -> list[str]:
    """Returns the names of the sets and the digest."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Sets of this machine, and their digest."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    return run(build(compiler, tmp_path_factory.mktemp("kernels") / "here"), ROUNDS)


def test_every_set_has_the_bits_of_the_portable_one(here):
    assert "portable" in here[:-1]


def test_aarch64_has_the_same_bits(here, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("aarch64-linux-gnu-gcc and qemu-aarch64 are not both installed")
    program = build(compiler, tmp_path / "there", "-static")
    assert run(emulator, program, ROUNDS) == ["neon", "portable", here[-1]]
