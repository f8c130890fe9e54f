"""Whether a source is quantized already, and how.

The tensors decide; the config only names the method.

A config may carry a block that no tensor bears out (a merge that forgot to delete it), may carry it
inside another part, and a tensor `X_scale` beside `X` means nothing where `X` has 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from codecllm.formats.shards.safetensors_header import TensorEntry

Entries = Mapping[str, TensorEntry]

BLOCK_KEYS = ("quantization_config", "compression_config")
_SCALED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "I8"})
_SCALE_DTYPES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
_INTEGERS = frozenset({"I8", "I16", "I32", "I64", "U8", "U16", "U32", "F4"})
# Names that GPTQ, AWQ, compressed-tensors, bitsandbytes, AQLM and Marlin give to integer tensors.
_PACKED_NAME = re.compile(
    r".*(\.qweight|\.qzeros|_packed|\.SCB|\.absmax|\.quant_map|\.quant_state\..*|\.codebooks|\.B)"
)

# Ends of names that stand beside weights with more than one scale, or a zero that is not 0.
_SECOND_SCALES = ("_scale_2", "_global_scale", "_zero_point")

# Last parts of names of integers that plain models have: positions, masks, counts, indices. Those
# that are called `indices` alone are VPTQ's codes.
_PLAIN_INTEGERS = re.compile(
    r"(.*_)?(ids?|idxs?|index|mask|.*eid|batches_tracked|counts?|steps?|len|lengths?|bias)"
    r"|.+_indices"
)

# Last parts of names of numbers that belong to activations, beside the weight of a layer, and of
# those of an attention above its layers: without a quantizer no module has them.
_OF_INPUTS = re.compile(r"(.*_)?(input|activation|output)_(scale|zero_point)(_inv)?")
_OF_ATTENTION = re.compile(r"(q|k|v|kv)(_cache)?_(scale|zero_point)")

KEEPS_16_BITS = frozenset({"bitnet"})
"""Methods with 16-bit weights that only the modules of the method use correctly."""

_MOST_DIGITS = 10

_METHOD = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Quantization:
    """The facts of a source's quantization.

    Attributes:
        method: the block's `quant_method`, or `unknown`.
        place: keys that lead to the block in the config; empty where there is none.
        block: the block, or None.
        scaled: weight -> its scales, where each weight is a number times its scale.
        blocks: prefix -> (blocks, scales) of weights in MXFP4.
        dropped: tensors that only a quantized model has, beside the scales.
        opaque: quantized tensors of other forms, and tensors of unknown use beside weights of
            these forms.
    """

    method: str = "unknown"
    place: tuple[str, ...] = ()
    block: Mapping[str, Any] | None = None
    scaled: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()

    @property
    def borne_out(self) -> bool:
        """Whether tensors are quantized, or the method keeps 16 bits."""
        has_tensors = bool(self.scaled or self.blocks or self.opaque)
        return has_tensors or (self.block is not None and self.method in KEEPS_16_BITS)

    @property
    def stale(self) -> bool:
        """Whether the config has a block that no tensor bears out."""
        return self.block is not None and not self.borne_out


def find_quantization(config: Mapping[str, Any] | None, entries: Entries) -> Quantization:
    """Returns how a source's tensors are quantized.

    Args:
        config: the parsed config.json, or None.
        entries: all tensors.
    """
    place, block = _find_block(config or {})
    method = _method(block)
    scale_names = _scaled_weights(entries)
    blocks = _mxfp4_weights(entries)
    side = set(scale_names.values()) | {name for pair in blocks.values() for name in pair}
    dropped_names = tuple(_of_activations(entries, [*scale_names, *blocks]))
    weights = {*scale_names, *blocks, *(pair[0] for pair in blocks.values())}
    unknown_names = set(_beside(entries, weights)) - side - {*dropped_names}
    opaque = tuple(
        name
        for name, entry in entries.items()
        if name in unknown_names
        or (
            name not in side
            and name not in scale_names
            and _is_opaque(entry, entries, block is not None)
        )
    )
    return Quantization(method, place, block, scale_names, blocks, dropped_names, opaque)


def _find_block(config: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any] | None]:
    """Returns the place and the content of the outermost quantization block."""
    # Level by level: transformers reads the outermost block.
    level: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), config)]
    while level:
        deeper: list[tuple[tuple[str, ...], Mapping[str, Any]]] = []
        for place, part in level:
            for key in BLOCK_KEYS:
                block = part.get(key)
                if isinstance(block, dict) and block:
                    return (*place, key), block
            deeper += [((*place, key), value) for key, value in _parts(part)]
        level = deeper
    return (), None


def _parts(part: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in part.items():
        if isinstance(value, dict):
            yield key, value


def _method(block: Mapping[str, Any] | None) -> str:
    name = str((block or {}).get("quant_method", "unknown")).lower()
    return name if _METHOD.fullmatch(name) else "unknown"


def has_transforms(block: Mapping[str, Any] | None) -> bool:
    """Whether the weights are those of rotated inputs or outputs (compressed-tensors)."""
    return bool((block or {}).get("transform_config"))


def block_sizes(block: Mapping[str, Any] | None) -> frozenset[tuple[int, int]]:
    """Returns the rows and columns of a weight that one scale is for, as a block states them.

    `weight_block_size` is that of FP8 checkpoints, `block_structure` and `group_size` are those of
    compressed-tensors, whose groups of layers may differ. The config is not trusted: whatever is no
    pair of positive integers counts as not stated.

    Examples:
        >>> sorted(block_sizes({"weight_block_size": [128, 128], "a": {"group_size": 32}}))
        [(1, 32), (128, 128)]
    """
    sizes, parts = set[tuple[int, int]](), [block or {}]
    while parts:
        part = parts.pop()
        candidates = [part.get("weight_block_size"), part.get("block_structure")]
        candidates.append([1, part.get("group_size")])
        for size in candidates:
            if isinstance(size, str):  # "128x128" in older checkpoints
                size = [int(n) for n in size.split("x") if n.isdecimal() and len(n) < _MOST_DIGITS]
            if not isinstance(size, list) or len(size) != 2:
                continue
            if all(type(n) is int and n > 0 for n in size):
                sizes.add((size[0], size[1]))
        parts += [value for _, value in _parts(part)]
    return frozenset(sizes)


def _scaled_weights(entries: Entries) -> dict[str, str]:
    """Returns the 8-bit matrices that have one set of scales, and the names of these."""
    scale_names = {}
    for name, entry in entries.items():
        if entry.dtype.name not in _SCALED_DTYPES or len(entry.shape) < 2:
            continue
        scale = _scale_of(name, entries)
        if scale is None or any(name + end in entries for end in _SECOND_SCALES):
            continue
        is_per_channel = entries[scale].elements in (1, entry.shape[0])
        if entry.dtype.name == "I8" and not is_per_channel:
            continue  # two FP4 codes in a byte, as some checkpoints have it
        scale_names[name] = scale
    return scale_names


def _scale_of(name: str, entries: Entries) -> str | None:
    stem = name.removesuffix("weight")
    # In spite of its name `_scale_inv` is a factor of the weight too (DeepSeek).
    inverse = f"{name}_scale_inv"
    candidates = [inverse, inverse.removesuffix("_inv")]
    if stem.endswith("."):
        candidates += [f"{stem}scale", f"{stem}qscale_weight"]
    for candidate in candidates:
        entry = entries.get(candidate)
        if entry is not None and entry.dtype.name in _SCALE_DTYPES:
            return candidate
    return None


def _mxfp4_weights(entries: Entries) -> dict[str, tuple[str, str]]:
    """Returns the weights of MXFP4.

    `X_blocks` holds blocks of 16 bytes, `X_scales` one shared exponent for each.
    """
    mxfp4_names = {}
    for name, entry in entries.items():
        stem = name.removesuffix("_blocks")
        scales = entries.get(f"{stem}_scales")
        if stem == name or scales is None:
            continue
        are_bytes = entry.dtype.name == "U8" and scales.dtype.name == "U8"
        if are_bytes and tuple(entry.shape) == (*scales.shape, 16):
            mxfp4_names[stem] = (name, f"{stem}_scales")
    return mxfp4_names


def _of_activations(entries: Entries, weights: Iterable[str]) -> Iterator[str]:
    """Yields names of numbers that only the quantizer of these weights has use for.

    A parameter of the model may end in the same words: it counts where it stands.
    """
    modules = {name.rpartition(".")[0] for name in weights}
    around = {parent for module in modules for parent in _parents(module)}
    for name in entries:
        module, _, last = name.rpartition(".")
        is_of_inputs = module in modules and _OF_INPUTS.fullmatch(last)
        if is_of_inputs or (module in around and _OF_ATTENTION.fullmatch(last)):
            yield name


def _beside(entries: Entries, weights: Collection[str]) -> Iterator[str]:
    """Yields tensors, biases apart, in the module of a weight, or whose names go on from its name.

    They may be a part of the weight: factors of its inputs, a sum of low rank, an order of its
    columns, the rest after rounding.
    """
    modules = {name.removesuffix("weight") for name in weights if name.endswith(".weight")}
    for name in entries:
        if name.endswith("bias") or (name in weights and name.endswith(".weight")):
            continue
        ends = [end for end, letter in enumerate(name) if letter in "._"]
        in_module = any(name[: end + 1] in modules for end in ends)
        if in_module or (name not in weights and any(name[:end] in weights for end in ends)):
            yield name


def _parents(module: str) -> Iterator[str]:
    """Yields a module's name and those of the modules around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_opaque(entry: TensorEntry, entries: Entries, has_block: bool) -> bool:
    """Whether a tensor shows a quantization that is not undone here."""
    if entry.dtype.name in _INTEGERS and _PACKED_NAME.fullmatch(entry.name):
        return True
    if any(entry.name + end in entries for end in _SECOND_SCALES) and entry.dtype.bits <= 8:
        return True
    # Without a block in the config, 8-bit floats may be the model's own type.
    if not has_block:
        return False
    # Each library has names of its own, and more come: integers beside a block are codes, but for
    # those that plain models have.
    is_code = entry.dtype.name in _INTEGERS and entry.elements > 1
    if is_code and not _PLAIN_INTEGERS.fullmatch(_last(entry.name)):
        return True
    if len(entry.shape) < 2:
        return False
    if entry.dtype.is_float and entry.dtype.bits <= 8:
        return True
    is_weight = entry.name.endswith("weight")
    has_scale = _scale_of(entry.name, entries) is not None
    return is_weight and (entry.dtype.name in _INTEGERS or has_scale)
