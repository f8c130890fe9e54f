"""Which scheme a tensor gets, and which of its dimensions is the output channel. The one place where names matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from codecllm.converter.plan.steps import Steps, grid_of, max_tiles
from codecllm.converter.source.source import SourceTensor
from codecllm.formats.codecs import CodecName, rans
from codecllm.formats.codecs.rans_groups import max_tables_bytes
from codecllm.formats.dtypes import DTYPES, INT8_SOURCES
from codecllm.formats.shards.side_tensors import SIDE_TENSORS, CodedLayout, SideTensor
from codecllm.formats.tiling import (
    DEFAULT_TILE_SYMBOLS,
    ChannelKind,
    Grid,
    channel_matrix,
    default_grid,
    last_axis_matrix,
)

Scheme = Literal["int8", "lossless"]

MIN_INT8_WEIGHTS = 1 << 16
MIN_CODED_BYTES = 4096

_TABLE_HEAD_BYTES = 64

KEPT_LOSSLESS = (
    # Routers: a wrong choice of expert costs far more than the few bytes.
    "*router*",
    "*.gate.weight",
    "*.gate.wg.weight",
    "*shared_expert_gate*",
    # Positional and token-type embeddings: small, and added to every position.
    "*position_embedding*",
    "*embed_positions*",
    "*pos_embed*",
    "*wpe.weight",
    "*token_type_embedding*",
    "*relative_attention_bias*",
)
"""Names that `int8` leaves `lossless` by default."""

_CONV1D_MODELS = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "gptsan"}
)
_CONV1D_NAMES = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight", "*.q_attn.weight")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What is to become of one tensor.

    Attributes:
        source: the tensor.
        scheme: `raw`, `lossless` or `int8`.
        axis: output channel's dimension (int8).
        kind: whether each row or each column of the matrix view has a scale (int8).
        fallback: why the scheme is not the one asked for, or None.
        codec: how its chunks are packed where that shrinks them.
        steppable: whether somebody may choose its steps (int8): room is kept for what they may need.
        steps: those that were chosen, or None.
        wide: whether its codes have 16 bits (int8).
        tile_symbols: most elements of a tile of whole rows.
    """

    source: SourceTensor
    scheme: Literal["raw", "lossless", "int8"]
    axis: int = 0
    kind: ChannelKind = "row"
    fallback: str | None = None
    codec: CodecName = "zstd"
    steppable: bool = False
    steps: Steps | None = None
    wide: bool = False
    tile_symbols: int = DEFAULT_TILE_SYMBOLS

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix as which a coded tensor is seen."""
        if self.scheme == "int8":
            return channel_matrix(self.source.shape, self.axis, self.kind)
        return last_axis_matrix(self.source.shape)

    @property
    def grid(self) -> Grid:
        """The tiles of a coded tensor."""
        if self.steps is None:
            return default_grid(*self.matrix, self.tile_symbols)
        return grid_of(self.steps, *self.matrix, self.tile_symbols)

    @property
    def planes(self) -> int:
        """Planes of a coded tensor."""
        return (2 if self.wide else 1) if self.scheme == "int8" else self.source.dtype.planes

    @property
    def channels(self) -> int:
        """Number of scales (int8)."""
        rows, cols = self.matrix
        return rows if self.kind == "row" else cols

    @property
    def layout(self) -> CodedLayout:
        """The facts on which the side tensors of a coded tensor depend, under its steps."""
        is_int8 = self.scheme == "int8"
        return CodedLayout(
            int8=is_int8,
            rank=len(self.source.shape),
            columns=self.matrix[1],
            channels=self.channels if is_int8 else 0,
            kind=self.kind,
            scale_dtype="F32" if self.steps is None else self.steps.scale_dtype,
            rans=self.codec == rans.NAME,
        )

    @property
    def longest_layout(self) -> CodedLayout:
        """As `layout`, with the longest name that the type of the scales may get."""
        return replace(self.layout, scale_dtype="BF16") if self.steppable else self.layout

    @property
    def possible_sides(self) -> list[SideTensor]:
        """The side tensors that a coded tensor may come to have; only chosen steps bring the optional ones."""
        layout = self.layout
        allowed = ("always", "optional") if self.steppable else ("always",)
        return [side for side in SIDE_TENSORS if side.presence(layout) in allowed]

    @property
    def max_stored_bytes(self) -> int:
        """Upper bound of the tensor's bytes in a shard, side data included, fallbacks not."""
        if self.scheme == "raw":
            return self.source.entry.bytes
        planes, tiles = self.planes, len(self.grid)
        if self.steppable:
            planes, tiles = 2, max(tiles, max_tiles(*self.matrix))
        chunks = tiles * planes
        side = _TABLE_HEAD_BYTES + 16 * chunks + self._max_side_bytes()
        if self.codec == rans.NAME:
            side += max_tables_bytes(chunks)
        return self.source.entry.elements * planes + 16 * chunks + side

    def _max_side_bytes(self) -> int:
        """Returns an upper bound of the side tensors whose lengths are known before anything is encoded."""
        # Counted as for rows, and at 4 bytes an element or more: where shards are cut follows from this bound, so another
        # bound would be another output.
        plan = replace(self, kind="row") if self.steppable else self
        layout = replace(self.layout, kind=plan.kind)
        total = 0
        for side in plan.possible_sides:
            length = side.length(layout)
            if length is not None:
                total += length * max(4, DTYPES[side.dtype(layout)].itemsize)
        return total


def plan_tensor(
    tensor: SourceTensor,
    scheme: Scheme,
    include: Sequence[str],
    exclude: Sequence[str],
    model_type: str,
    codec: CodecName = "zstd",
    steppable: bool = False,
    tile_symbols: int = DEFAULT_TILE_SYMBOLS,
) -> TensorPlan:
    """Decides a tensor's scheme.

    Args:
        tensor: the tensor.
        scheme: what the user asked for.
        include: glob patterns of names to quantize beside the default ones (any float matrix, of any size).
        exclude: glob patterns of names not to quantize; they win.
        model_type: the config's, for the channel axis.
        codec: how chunks are packed.
        steppable: whether somebody may choose the steps of int8 tensors.
        tile_symbols: most elements of a tile of whole rows.
    """
    if not _can_be_coded(tensor):
        return TensorPlan(tensor, "raw")
    if scheme == "int8" and _is_quantized(tensor, include, exclude):
        axis, kind = channel_axis(tensor.name, tensor.shape, model_type)
        return TensorPlan(
            tensor, "int8", axis, kind, codec=codec, steppable=steppable, tile_symbols=tile_symbols
        )
    return plan_lossless(tensor, None, codec, tile_symbols)


def plan_lossless(
    tensor: SourceTensor, fallback: str | None, codec: CodecName, tile_symbols: int
) -> TensorPlan:
    """Returns the plan that keeps every bit: `lossless` where planes exist and the size is worth it, else `raw`."""
    if (
        not _can_be_coded(tensor)
        or tensor.dtype.planes == 0
        or tensor.entry.bytes < MIN_CODED_BYTES
    ):
        return TensorPlan(tensor, "raw", fallback=fallback)
    return TensorPlan(tensor, "lossless", fallback=fallback, codec=codec, tile_symbols=tile_symbols)


def channel_axis(name: str, shape: tuple[int, ...], model_type: str) -> tuple[int, ChannelKind]:
    """Returns the output channel's dimension and the kind of its scales.

    | tensor                              | stored as     | axis | kind   |
    |-------------------------------------|---------------|------|--------|
    | nn.Linear, nn.Embedding, default    | [out, ...]    | 0    | row    |
    | Conv1D of GPT-2 and its kin         | [in, out]     | 1    | column |
    | fused experts                       | [E, out, in]  | 1    | row    |
    """
    if model_type in _CONV1D_MODELS and len(shape) == 2 and _matches(name, _CONV1D_NAMES):
        return 1, "column"
    if len(shape) == 3 and "experts" in name:
        return 1, "row"
    return 0, "row"


def _can_be_coded(tensor: SourceTensor) -> bool:
    return len(tensor.shape) >= 2 and tensor.entry.elements > 0


def _is_quantized(tensor: SourceTensor, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if tensor.dtype.name not in INT8_SOURCES or _matches(tensor.name, exclude):
        return False
    if _matches(tensor.name, include):
        return True
    is_matrix = len(tensor.shape) == 2 or (len(tensor.shape) == 3 and "experts" in tensor.name)
    large = tensor.entry.elements >= MIN_INT8_WEIGHTS
    return is_matrix and large and not _matches(tensor.name, KEPT_LOSSLESS)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
