"""Compiles the kernels that make elements and products, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_SCRIPT = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from codecllm.loader.kernels import assemble, dequantize, expert_planes, int8_experts, int8_linear

GEOMETRY = dict(rows="i32", cols="i32", tile_rows="i32", tile_cols="i32", across="i32", tall="i32",
                wide="i32")
PLANES = {f"p{number}": "*u8" for number in range(8)}
CODES = dict(low="*u8", high="*u8", low_bits="*i32", row_scale="*fp32", col_scale="*fp32",
             places="*i32", stored_tile_rows="i32", stored_tile_cols="i32", stored_across="i32",
             **GEOMETRY)
EVEN = ("cols", "quads")
PRODUCT = dict(codes="*i8", scale="*fp32", bias="*bf16", out="*bf16", rows="i32")


def compiled(fn, types, warps, **constants):
    names = fn.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in names if signature[name][0] == "*" or name in EVEN]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attrs)
    target = GPUTarget(*json.loads(sys.argv[1]))
    kernel = triton.compile(source, target=target, options=dict(num_warps=warps))
    return kernel.asm.get("ptx", "")


block = dict(BLOCK_ROWS=1, BLOCK_COLS=4096)
flags = dict(PLANES=8, ROTATES=True, ONE_TILE=False)
compiled(assemble._assemble_kernel, PLANES | GEOMETRY | {"out": "*i64"}, 4, **flags, **block)
flags = dict(WIDE_CODES=True, BY_ROW=True, BY_COL=True, MOVED=True, ROUNDS=True, ONE_TILE=False)
compiled(dequantize._dequantize_kernel, CODES | {"out": "*i16"}, 4, **flags, **block)
flags = dict(WIDE_CODES=False, BY_ROW=True, BY_COL=False, MOVED=False, ROUNDS=False, ONE_TILE=True)
plain = compiled(dequantize._dequantize_kernel, CODES | {"out": "*bf16"}, 4, **flags, **block)
types = PRODUCT | dict(inputs="*i64", codes="*i32", quads="i32")
flags = dict(HAS_BIAS=True, IS_BFLOAT16=True, EVEN=True)
rows = compiled(int8_linear._rows_kernel, types, 4, ROWS=2, QUADS=512, **flags)
types = PRODUCT | dict(inputs="*bf16", tokens="i32", cols="i32", out="*fp32")
shape = dict(ROWS=32, TOKENS=16, COLUMNS=64)
flags = dict(HAS_BIAS=True, EVEN=True, WIDENS=False, SPLITS=2)
tiles = compiled(int8_linear._tiles_kernel, types, 4, **flags, **shape)
types = PRODUCT | dict(sums="*fp32", tokens="i32")
compiled(int8_linear._sum_kernel, types, 4, HAS_BIAS=True, SPLITS=2, BLOCK=1024)
types = {name: "*i64" for name in ("order", "expert", "slot", "start", "stop")}
types |= {name: "i32" for name in ("rows", "cols", "chosen")}
types |= {f"{name}_stride": "i32" for name in ("codes", "scale", "col", "bounds", "out")}
types |= dict(inputs="*bf16", codes="*i8", scale="*fp32", col_scale="*fp32", out="*bf16")
types |= dict(bounds="*i32", places="*i32", values="*i16")
flags = dict(HAS_COLUMNS=True, HAS_WIDE=True, EVEN=True, WIDENS=False)
shape = dict(ROWS=64, TOKENS=16, COLUMNS=128, ENTRY_ROWS=32, TAKEN=64)
experts = compiled(int8_experts._experts_kernel, types, 4, **flags, **shape)
types |= {f"plane{number}": "*i32" for number in range(3)}
types |= dict(numbers="*i64", units="i32", out="*i32")
flags = dict(BITS=7, LOW=4, UNIT=128, HAS_NEAR=True, ROWS=32, TAKEN=256)
planes = compiled(expert_planes._unpack_kernel, types, 4, **flags)
print(json.dumps([plain, rows, tiles, experts, planes]))
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
    plain, rows, tiles, experts, planes = json.loads(done.stdout.splitlines()[-1])
    if target == ["cuda", 90, 32]:
        # Codes are read and bfloat16 written 16 bytes a thread, rounded in hardware; products use
        # the matrix units.
        assert plain.count("st.global.v4.b32") == 4
        assert "ld.global.v4.b32" in plain
        assert "cvt.rn.bf16x2.f32" in plain
        assert rows.count("v4.b32") == 2
        assert "v2.b64" in rows
        assert "mma" in tiles
        assert "mma" in experts
        assert planes.count("st.global.v4") == 2
        assert planes.count("ld.global.v4") == 6
