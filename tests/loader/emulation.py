"""rans.cu on a CPU: compiled by a C++ compiler, 32 coroutines acting as a warp (warp.hpp)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from codecllm.loader.kernels import nvrtc, rans

HERE = Path(__file__).parent


class EmulatedKernel(nvrtc.Kernel):
    """Stands in for the compiled kernel: takes tensors in host memory."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def launch(
        self, blocks: int, threads: int, shared: int, arguments: Sequence[torch.Tensor | int]
    ) -> None:
        assert threads == 32
        assert shared <= 48 << 10
        given = [
            value if isinstance(value, int) else ctypes.c_void_p(value.data_ptr())
            for value in arguments
        ]
        self._library.launch(blocks, *given)


@cache
def emulated_kernel() -> EmulatedKernel:
    """Compiles and loads the kernel once; skips where there is no C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to run rans.cu on a CPU")
    with TemporaryDirectory() as folder:
        made = Path(folder) / "rans.so"
        parts = [
            HERE / "warp.hpp",
            Path(rans.__file__).with_name("rans.cu"),
            HERE / "warp_main.hpp",
        ]
        source = "".join(f'#include "{part}"\n' for part in parts)
        command = [
            compiler,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            "-o",
            str(made),
            "-",
        ]
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return EmulatedKernel(ctypes.CDLL(str(made)))
