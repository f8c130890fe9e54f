"""linear.cu and pack.cu on a CPU: a C++ compiler; coroutines (block.hpp) as threads of a block."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from codecllm.loader.packed import kernels

HERE = Path(__file__).parent


class EmulatedLaunch:
    """Stands in for `nvrtc.Launch`."""

    def __init__(
        self, function: Any, blocks: tuple[int, int], threads: int, arguments: list[Any]
    ) -> None:
        self._function, self._sizes = function, (*blocks, threads)
        self._arguments = [
            value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments
        ]
        self._pointers = [isinstance(value, torch.Tensor) for value in arguments]

    def run(self, stream: int, changes: list[tuple[int, int]]) -> None:
        for index, value in changes:
            self._arguments[index] = value
        values = [
            ctypes.c_void_p(value) if is_pointer else ctypes.c_int(value)
            for value, is_pointer in zip(self._arguments, self._pointers, strict=True)
        ]
        self._function(*self._sizes, *values)


class EmulatedKernel:
    """Stands in for `nvrtc.Kernel`."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def prepare(
        self, blocks: tuple[int, int], threads: int, shared: int, arguments: list[Any]
    ) -> EmulatedLaunch:
        assert shared <= kernels.LEAST_SHARED
        return EmulatedLaunch(self._function, blocks, threads, arguments)

    def launch(self, blocks: int, threads: int, shared: int, arguments: list[Any]) -> None:
        self.prepare((blocks, 1), threads, shared, arguments).run(0, [])


@cache
def emulated_kernel(
    name: str, bits: int, is_half: bool, shape: kernels.Shape, device: torch.device
) -> EmulatedKernel:
    """Stands in for `kernels.kernel_of`; compiles a setting once."""
    library = _library(kernels.source_of(bits, is_half, shape), "linear_main.hpp")
    return EmulatedKernel(getattr(library, f"launch_{name}"))


@cache
def emulated_packing_kernel(
    name: str, bits: int, source_bytes: int, device: torch.device
) -> EmulatedKernel:
    """Stands in for `kernels.packing_kernel_of`."""
    library = _library(kernels.packing_source_of(bits, source_bytes), "pack_main.hpp")
    return EmulatedKernel(getattr(library, f"launch_{name}"))


@cache
def _library(source: str, main: str) -> ctypes.CDLL:
    """Compiles a source; skips where there is no C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to run kernels on a CPU")
    # The macros of the setting come first: block.hpp needs them too.
    macros, comment, kernel_source = source.partition("//")
    parts = [macros, f'#include "{HERE}/block.hpp"\n', comment, kernel_source]
    parts += [f'\n#include "{HERE}/{main}"\n']
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.so"
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-x", "c++", "-o"]
        process = subprocess.run(
            [*command, str(target), "-"],
            input="".join(parts),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        return ctypes.CDLL(str(target))
