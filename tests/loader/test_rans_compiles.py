"""The rans kernels compile for GPUs, without a GPU: a compiler may refuse interpreted code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from codecllm.loader.kernels import rans

TYPES = dict(as_int32="*i32", as_int16="*i16", fields="*i64", symbols="*u8", ranges="*i32",
             precisions="*i32", arena="*u8", faults="*i32", slots="i32")


def compiled(fn, constants, warps):
    names = fn.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    pointers = [name for name in names if signature[name][0] == "*"]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    target = GPUTarget(*json.loads(sys.argv[1]))
    return triton.compile(source, target=target, options=dict(num_warps=warps))


kernel = compiled(rans._decode_kernel, {}, 1)
compiled(rans._fill_kernel, dict(BLOCK=1024), 4)
print(json.dumps([kernel.metadata.shared, kernel.asm.get("ptx", "")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [["cuda", 75, 32], ["cuda", 90, 32], ["hip", "gfx942", 64]], ids=str
)
def test_the_kernels_compile(target, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _SCRIPT, json.dumps(target)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared, ptx = json.loads(done.stdout.splitlines()[-1])
    if target == ["cuda", 90, 32]:
        # A vote of the warp is one reduction, its count one instruction, and lanes never meet in
        # shared memory.
        assert shared == 0
        assert "redux.sync" in ptx
        assert "popc" in ptx


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_the_kernel_in_cuda_c_compiles_without_local_memory(architecture, tmp_path):
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        pytest.skip(
            "needs nvcc; where torch has CUDA, NVRTC compiles the kernel in test_rans_kernel.py"
        )
    source = Path(__file__).parents[2] / "loader" / "kernels" / "rans.cu"
    command = [
        compiler,
        f"-arch={architecture}",
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        str(tmp_path / "rans.cubin"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
