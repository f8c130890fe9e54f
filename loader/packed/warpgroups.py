"""Products of many inputs by warpgroups: `warpgroups.cu`, for the matrix units of Hopper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from codecllm.loader.kernels.nvrtc import Launch
from codecllm.loader.packed.kernels import (
    NULL,
    Launches,
    kernel_of,
    optional,
    prepare_launch,
    shared_memory,
    source_of,
)
from codecllm.loader.packed.layout import TILE_COLS, tile_words
from codecllm.loader.packed.matrix import PackedMatrix

MAX_TOKENS = 256
"""Most inputs of `warpgroups.cu`."""

HOPPER = (9, 0)
"""The compute capability that has these instructions; later ones have others."""

_TOKEN_TILES = (2, 4, 8, 16)
_FASTEST = {
    ("tall", 2): ((4, 2, 3, 2), (4, 2, 3, 2)),
    ("tall", 4): ((4, 2, 3, 2), (4, 2, 4, 1)),
    ("tall", 8): ((4, 2, 3, 2), (4, 2, 4, 1)),
    ("tall", 16): ((4, 2, 3, 2), (4, 2, 4, 1)),
    ("tall", 0): ((4, 1, 3, 2), (4, 1, 4, 1)),
    ("wide", 2): ((2, 8, 3, 2), (2, 8, 4, 1)),
    ("wide", 4): ((2, 8, 3, 2), (1, 8, 4, 1)),
    ("wide", 8): ((1, 4, 3, 2), (1, 4, 4, 1)),
    ("wide", 16): ((1, 2, 4, 2), (1, 2, 4, 2)),
    ("wide", 0): ((2, 2, 3, 2), (2, 2, 3, 2)),
    ("square", 2): ((2, 8, 3, 2), (2, 8, 4, 1)),
    ("square", 4): ((4, 4, 3, 2), (1, 4, 3, 2)),
    ("square", 8): ((1, 4, 3, 2), (1, 4, 4, 1)),
    ("square", 16): ((1, 2, 4, 2), (1, 2, 4, 2)),
    ("square", 0): ((2, 2, 3, 2), (2, 2, 3, 2)),
    ("short", 2): ((1, 8, 4, 2), (1, 8, 4, 2)),
    ("short", 4): ((1, 8, 4, 2), (1, 8, 4, 2)),
    ("short", 8): ((1, 8, 4, 2), (1, 8, 4, 2)),
    ("short", 16): ((2, 8, 3, 2), (2, 8, 3, 2)),
    ("short", 0): ((2, 4, 3, 2), (2, 4, 3, 2)),
}
"""Kind of matrix, and tiles of 8 inputs or 0 for several blocks of them -> the rest of the fastest
shape for codes, and for lossless weights."""

_GROUP_ROWS = 64
_BARRIERS = 128
"""Bytes ahead of the ring, for 16 barriers."""

_CHUNK = 64
_PITCH_PAD = 4


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Setting of `packed_groups`.

    Attributes:
        token_tiles: tiles of 8 inputs of a block: 2, 4, 8 or 16.
        groups: warpgroups of a block, each with 64 rows of its own: 1, 2 or 4.
        splits: blocks that share the columns of the same rows, a cluster: 1, 2, 4 or 8.
        stages: buffers of a ring in shared memory, 16 at most; all but one are filled while one is
            read.
        step_tiles: tiles of 64 columns in a buffer: 1 or 2.
    """

    token_tiles: int
    groups: int
    splits: int
    stages: int = 4
    step_tiles: int = 1

    @property
    def rows(self) -> int:
        """Returns the rows of a block."""
        return _GROUP_ROWS * self.groups

    @property
    def tokens(self) -> int:
        """Returns the inputs of a block."""
        return 8 * self.token_tiles

    @property
    def threads(self) -> int:
        """Returns the threads of a block."""
        return 128 * self.groups

    def shared(self, bits: int) -> int:
        """Returns the bytes of dynamic shared memory of a block, for `bits` a weight."""
        weights = 4 * self.groups * 4 * tile_words(bits)
        inputs = self.tokens * TILE_COLS * 2
        sums = 4 * min(self.tokens, _CHUNK) * (self.rows + _PITCH_PAD)
        return _BARRIERS + max(self.stages * self.step_tiles * (weights + inputs), sums)

    def within(self, bits: int, shared: int) -> GroupShape:
        """Returns the shape with as many of its stages as fit; two have to.

        Args:
            bits: bits of a weight.
            shared: bytes of shared memory that a block may have.
        """
        shape = self
        while shape.stages > 2 and shape.shared(bits) > shared:
            shape = replace(shape, stages=shape.stages - 1)
        return shape

    def source(self, bits: int, is_half: bool) -> str:
        """Returns the source of `packed_groups` for `bits` a weight and the dtype of inputs."""
        return _source(self, bits, is_half)


@cache
def _source(shape: GroupShape, bits: int, is_half: bool) -> str:
    macros = {
        "BITS": bits,
        "IS_HALF": int(is_half),
        "TOKEN_TILES": shape.token_tiles,
        "GROUPS": shape.groups,
        "SPLITS": shape.splits,
        "STAGES": shape.stages,
        "STEP_TILES": shape.step_tiles,
    }
    text = instruction(shape.token_tiles, is_half)
    return source_of(macros, "tile.cu", "warpgroups.cu", between=text)


def instruction(token_tiles: int, is_half: bool) -> str:
    """Returns the C function `multiply_group`: one product of a warpgroup.

    It adds 64 rows x 16 columns of weights, in registers, times 16 columns of all inputs, in shared
    memory, to sums in registers.
    """
    count = 4 * token_tiles
    kind = "f16" if is_half else "bf16"
    sums = ", ".join(f"%{k}" for k in range(count))
    weights = ", ".join(f"%{count + k}" for k in range(4))
    outputs = ", ".join(f'"+f"(sums[{k // 4}][{k % 4}])' for k in range(count))
    inputs = ", ".join(f'"r"(weights[{k}])' for k in range(4))
    return f"""#ifndef EMULATED
static __device__ __forceinline__ void multiply_group(
    float (*sums)[4], const unsigned* weights, unsigned long long inputs) {{
    asm volatile(
        "{{ .reg .pred adds; setp.eq.u32 adds, 0, 0;"
        " wgmma.mma_async.sync.aligned.m64n{8 * token_tiles}k16.f32.{kind}.{kind}"
        " {{{sums}}}, {{{weights}}}, %{count + 4}, adds, 1, 1, 0; }}"
        : {outputs}
        : {inputs}, "l"(inputs));
}}
#endif
"""


@cache
def choose_group_shape(tokens: int, rows: int, cols: int, bits: int, shared: int) -> GroupShape:
    """Returns the shape that `packed_groups` uses: the fastest one of an H200.

    `benchmarks/device/packed.py` measures them.

    Few rows or many columns need more blocks for the same rows, as for `warps.choose_shape`.

    Args:
        tokens: number of inputs.
        rows: rows of the matrix.
        cols: its columns.
        bits: bits of a weight in the layout.
        shared: bytes of shared memory that a block may have.
    """
    fitting = next((tiles for tiles in _TOKEN_TILES if 8 * tiles >= tokens), 0)
    if rows >= 8192:
        kind = "tall"
    elif rows < 4096:
        kind = "short"
    else:
        kind = "wide" if cols >= 8192 else "square"
    codes, lossless = _FASTEST[kind, fitting]
    tiles = fitting or _TOKEN_TILES[-1]
    return GroupShape(tiles, *(lossless if bits > 8 else codes)).within(bits, shared)


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """How a number of inputs is multiplied by `warpgroups.cu`.

    Attributes:
        launch: of the product.
        prepare: launch that writes the inputs as it takes them.
        prepared: elements of these.
        by_column: elements of the inputs by column, 0 where they are not needed.
    """

    launch: Launch
    prepare: Launch
    prepared: int
    by_column: int

    def run(
        self, inputs: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, stream: int
    ) -> None:
        """Queues the product on a stream; see `WarpPlan.run`."""
        tokens = out.numel() // out.shape[-1]
        room = inputs.new_empty(self.prepared + self.by_column)
        prepared = room.data_ptr()
        by_column = prepared + 2 * self.prepared if self.by_column else 0
        self.prepare.run(
            stream, [(0, inputs.data_ptr()), (2, prepared), (3, by_column), (4, tokens)]
        )
        changes = [(1, prepared), (2, by_column), (7, out.data_ptr()), (8, tokens)]
        if bias is not None:
            changes.append((6, bias.data_ptr()))
        self.launch.run(stream, changes)


def plan(
    matrix: PackedMatrix,
    launches: Launches,
    tokens: int,
    inputs: torch.Tensor,
    bias: torch.Tensor | None,
) -> GroupPlan:
    """Returns how `tokens` inputs like `inputs`, [..., cols], are multiplied."""
    rows, cols, bits, device = matrix.rows, matrix.cols, matrix.bits, inputs.device
    is_half = inputs.dtype == torch.float16
    shape = choose_group_shape(tokens, rows, cols, bits, shared_memory(device))
    token_blocks = -(-tokens // shape.tokens)
    all_tokens, col_tiles = token_blocks * shape.tokens, -(-cols // TILE_COLS)
    key = (shape, is_half, bias is None, token_blocks)

    def product() -> Launch:
        arguments: list[torch.Tensor | int] = [
            matrix.words,
            NULL,
            NULL,
            *optional(matrix.first, matrix.entries, matrix.scale),
            NULL,
            NULL,
            tokens,
            rows,
            cols,
            matrix.factor,
        ]
        kernel = kernel_of("packed_groups", shape.source(bits, is_half), device)
        blocks = (-(-rows // shape.rows) * token_blocks, shape.splits)
        shared = shape.shared(bits)
        return kernel.prepare(blocks, shape.threads, shared, arguments, overlaps=True)

    def prepare() -> Launch:
        blocks = min(-(-col_tiles * 8 * all_tokens // 256), 1056)
        sizes = (tokens, cols, shape.token_tiles)
        return prepare_launch("prepare_groups", matrix.col_scale, inputs, sizes, blocks)

    return GroupPlan(
        launches.get(("groups", *key), product),
        launches.get(("prepare", *key), prepare),
        col_tiles * TILE_COLS * all_tokens,
        cols * all_tokens if matrix.first is not None else 0,
    )
