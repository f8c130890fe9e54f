"""Which scheme a tensor gets, and which of its dimensions is the output channel.

The one place where names matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from codecllm.converter.options import ConvertOptions
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.codecs import CodecName
from codecllm.formats.dtypes import INT8_SOURCES
from codecllm.formats.tiling import (
    ChannelKind,
)

MIN_INT8_WEIGHTS = 1 << 16
# Below, side tensors and their entries in header and manifest outweigh the gain.
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

_EMBEDDINGS = ("*embed*", "*wte.weight", "shared.weight", "*.shared.weight")
"""Tables of embeddings, of which packed exports make no layer."""

# Models built of transformers' Conv1D; other models use the same names for nn.Linear.
_CONV1D_MODELS = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "gptsan"}
)
_CONV1D_NAMES = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight", "*.q_attn.weight")


def plan_tensor(
    tensor: SourceTensor, options: ConvertOptions, model_type: str, *, accepts_params: bool = False
) -> TensorPlan:
    """Decides the scheme of a tensor.

    Args:
        tensor: the tensor.
        options: of the conversion. `include` takes any float tensor of rank 2 or more, of any size;
            `exclude` wins.
        model_type: that of the config, for the channel axis.
        accepts_params: whether int8 tensors may get chosen quantization parameters.
    """
    tile_symbols = options.chunk_kib << 10
    if not _can_be_coded(tensor):
        return TensorPlan(tensor, "raw")
    if options.scheme == "int8" and _is_quantized(tensor, options.include, options.exclude):
        axis, kind = channel_axis(tensor.name, tensor.shape, model_type)
        return TensorPlan(
            tensor,
            "int8",
            axis,
            kind,
            codec=options.codec,
            accepts_params=accepts_params,
            tile_symbols=tile_symbols,
        )
    return plan_lossless(tensor, None, options.codec, tile_symbols)


def plan_lossless(
    tensor: SourceTensor, fallback: str | None, codec: CodecName, tile_symbols: int
) -> TensorPlan:
    """Returns the plan that keeps every bit.

    `lossless` where planes exist and the size is worth it, else `raw`.
    """
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

    Examples:
        >>> channel_axis("h.0.attn.c_attn.weight", (768, 2304), "gpt2")
        (1, 'column')
        >>> channel_axis("model.layers.0.mlp.up_proj.weight", (11008, 4096), "llama")
        (0, 'row')
    """
    if model_type in _CONV1D_MODELS and len(shape) == 2 and _matches(name, _CONV1D_NAMES):
        return 1, "column"
    # Fused experts are a batch of matrices; other tensors of rank 3 are convolutions.
    if len(shape) == 3 and "experts" in name:
        return 1, "row"
    return 0, "row"


def is_embedding(name: str) -> bool:
    """Whether a tensor is a table of embeddings, by its name.

    Examples:
        >>> is_embedding("model.embed_tokens.weight"), is_embedding("lm_head.weight")
        (True, False)
    """
    return _matches(name, _EMBEDDINGS)


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
