"""The kernels of the packed layout on a CPU: a C++ compiler; coroutines (block.hpp) as threads."""

from __future__ import annotations

import ctypes
import re
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
_KERNEL = re.compile(r"__global__ [^(]*(?:\([^)]*\))? (\w+)\(")


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
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._function(*self._sizes, places)


class EmulatedKernel:
    """Stands in for `nvrtc.Kernel`."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def prepare(
        self,
        blocks: tuple[int, int],
        threads: int,
        shared: int,
        arguments: list[Any],
        overlaps: bool = False,
    ) -> EmulatedLaunch:
        assert shared <= kernels.LEAST_SHARED
        return EmulatedLaunch(self._function, blocks, threads, arguments)

    def launch(self, blocks: int, threads: int, shared: int, arguments: list[Any]) -> None:
        self.prepare((blocks, 1), threads, shared, arguments).run(0, [])


@cache
def emulated_kernel(name: str, source: str, device: torch.device) -> EmulatedKernel:
    """Stands in for `kernels.kernel_of`; compiles a source once."""
    return EmulatedKernel(getattr(_library(source), f"launch_{name}"))


@cache
def _library(source: str) -> ctypes.CDLL:
    """Compiles a source; skips where there is no C++ compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to run kernels on a CPU")
    # The macros of the setting come first: the headers need them too.
    macros, comment, kernel_source = source.partition("//")
    names = _KERNEL.findall(source)
    parts = [macros, f'#include "{HERE}/block.hpp"\n']
    if "packed_groups" in names:
        parts.append(f'#include "{HERE}/groups.hpp"\n')
    parts += [comment, kernel_source, f'\n#include "{HERE}/launch.hpp"\n']
    parts += [f"LAUNCHER({name})\n" for name in names]
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
