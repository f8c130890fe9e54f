"""int8 codes in the layout of the compressed-tensors library.

`pack-quantized`, 2 to 8 bits, one scale per output channel.

A weight `X.weight` [out, in] becomes `X.weight_packed` int32 [out, words] (`packed_words`),
`X.weight_scale` float32 [out, 1] and `X.weight_shape` int64 [2]. Codes and scales are the
container's own, so nothing is lost. All packed tensors have one width: transformers takes a single
one for all linear layers where it dequantizes (`CompressedTensorsDequantize`, 5.23), and would read
codes of another width as wrong weights. The library's other int8 layout, `int-quantized`, is for
activations that are quantized too (its `IntQuantizationCompressor.can_compress` asks for them);
ours are not. Read from compressed-tensors 0.20.0: `compressors/pack_quantized`,
`compressors/format.py`, `quantization/quant_args.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from codecllm.converter.exports.packed_words import WIDTHS, holds, least_width
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.formats.machine import threads_of
from codecllm.formats.manifest.manifest import Manifest
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, TensorRecord
from codecllm.formats.reference import read_run_codes, runs
from codecllm.formats.stored_tensor import StoredTensor

FORMAT = "pack-quantized"
_SUFFIX = ".weight"

PACKED, PACKED_SCALE, PACKED_SHAPE = "weight_packed", "weight_scale", "weight_shape"
"""Names that the layout gives to the parts of a module's weight."""
_EXPERT = ".experts."
_NUMBER = re.compile(r"(^|\.)\d+(\.|$)")
"""Of a layer: modules whose names have none are outside of the layers."""
_DENSE = "--format safetensors writes the weights dequantized"


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Which tensors of a container are written packed, and the block of config.json that says so.

    Attributes:
        packed: names of the tensors, each the weight of an nn.Linear or of one expert.
        width: bits of a packed code, 2 to 8.
        ignore: modules whose weights are written plainly though they are linear, or int8 in the
            container.
        notes: sentences for the user.
    """

    packed: frozenset[str]
    width: int
    ignore: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def quantization_config(self) -> dict[str, Any]:
        """The block of config.json by which transformers, vLLM and others know the layout."""
        weights = {
            "num_bits": self.width,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
            "dynamic": False,
        }
        # In vLLM a head is no "Linear": it is found by its name alone.
        heads = sorted(name for name in map(_module_of, self.packed) if not _NUMBER.search(name))
        group = {
            "targets": ["Linear", *heads],
            "format": FORMAT,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(self.ignore),
        }


PLAIN = PackedLayout(frozenset(), 8, ())
"""Packs nothing."""


def plan_layout(
    container: Container,
    linear_modules: Iterable[str],
    *,
    width: int | None = None,
    workers: int | None = None,
) -> PackedLayout:
    """Decides which tensors are written packed, and with how many bits.

    Int8 weights [out, in] of linear modules that share them with no other tensor are packed.
    Tensors with codes beyond 8 bits are written plainly, and with them the linear modules beside
    them that have as many inputs: engines fuse such modules (queries, keys and values) and want all
    of them in one form. So are all experts, if one of them is.

    Experts that the checkpoint holds one by one are packed too, though the model class may fuse
    them: the library's loaders expect all of a model's experts in one form.

    Where steps follow from the largest weights, codes have 8 bits. Else they are decoded here, to
    find the largest ones.

    Args:
        container: opened.
        linear_modules: names of the model's nn.Linear modules.
        width: bits of a packed code, 2 to 8; None takes the fewest that hold all codes.
        workers: decoding threads; None takes one per core.

    Raises:
        UsageError: there is nothing to pack, scales of columns stand in the way, or codes do not
            fit into `width`.
        FormatError: a tensor is damaged.
    """
    if width is not None and width not in WIDTHS:
        raise UsageError(
            "bits of a packed code", got=width, expected=f"{WIDTHS.start} to {WIDTHS.stop - 1}"
        )
    manifest = container.manifest
    if manifest.options.scheme != "int8":
        raise UsageError(
            "compressed-tensors holds int8 weights, and this container is "
            f"{manifest.options.scheme}: --format safetensors gives every bit back"
        )
    linear = set(linear_modules)
    eligible = _eligible(manifest, linear)
    _refuse_columns(eligible)
    with ThreadPoolExecutor(threads_of(workers)) as executor:
        spans = executor.map(partial(_code_range, container), eligible.values())
        ranges = dict(zip(eligible, spans, strict=True))
    wide = {name for name, span in ranges.items() if least_width(*span) is None}
    packed = frozenset(_without_mixed_siblings(manifest, linear, eligible.keys() - wide))
    if wide and width is not None:
        name = min(wide)
        raise _beyond(name, ranges[name], width)
    if not packed:
        raise UsageError(
            "no int8 tensor of this container is the weight of a linear module with codes of at "
            f"most 8 bits: nothing to export packed; {_DENSE}"
        )
    needed = max(least_width(*ranges[name]) or 0 for name in packed)
    if width is not None and width < needed:
        name = next(name for name in sorted(packed) if not holds(width, *ranges[name]))
        raise _beyond(name, ranges[name], width, needed)
    return PackedLayout(
        packed,
        width or needed,
        _ignored(manifest, linear, packed),
        _notes(eligible, packed, wide, width or needed),
    )


def _eligible(manifest: Manifest, linear: set[str]) -> dict[str, Int8Tensor]:
    """Returns the int8 weights of linear modules and of experts, codes aside."""
    targets = {record.alias_of for record in manifest.tensors if isinstance(record, AliasTensor)}
    return {
        record.name: record
        for record in manifest.tensors
        if isinstance(record, Int8Tensor)
        and len(record.shape) == 2
        and (record.channel_axis, record.channel_kind) == (0, "row")
        and record.name.endswith(_SUFFIX)
        and record.name not in targets
        and (_module(record) in linear or _EXPERT in record.name)
    }


def _refuse_columns(eligible: Mapping[str, Int8Tensor]) -> None:
    """Refuses scales of columns: nothing in the layout holds them, nothing before it takes them.

    A norm or a projection before the layer could take a factor of its columns, but has weights of
    the source's dtype: the product of two of them is rounded there, unless one is a power of two.

    Raises:
        UsageError: a tensor has them.
    """
    having = sorted(name for name, one in eligible.items() if one.xxh3.col_scale is not None)
    if having:
        raise UsageError(
            "compressed-tensors has one scale per output channel and none per column: convert "
            f"again with --no-column-scales; {_DENSE}",
            tensor=having[0],
            got=f"scales of columns in {len(having)} of {len(eligible)} tensors",
        )


def _code_range(container: Container, record: Int8Tensor) -> tuple[int, int]:
    """Returns the smallest and the largest code of a tensor, or bounds of them."""
    if record.rounding is None:
        return -127, 127  # each scale is the largest weight / 127
    tensor = container.tensor(record.name)
    assert isinstance(tensor, StoredTensor)
    lowest = highest = 0
    for tiles in runs(tensor):
        for codes in read_run_codes(tensor, tiles):
            lowest = min(lowest, int(codes.min()))
            highest = max(highest, int(codes.max()))
    return lowest, highest


def _without_mixed_siblings(
    manifest: Manifest,
    linear: set[str],
    names: set[str],
) -> set[str]:
    """Returns those names all of whose siblings, too, are in `names`."""
    siblings: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for record in manifest.tensors:
        if _may_be_fused(record, linear):
            siblings[_family(record)].add(record.name)
    whole = [family for family in siblings.values() if family <= names]
    return set().union(*whole)


def _may_be_fused(record: TensorRecord, linear: set[str]) -> bool:
    if len(record.shape) != 2:
        return False
    if _EXPERT in record.name:
        return True
    return record.name.endswith(_SUFFIX) and _module(record) in linear


def _family(record: TensorRecord) -> tuple[str, int]:
    """Returns what the weights of linear modules have in common that engines may fuse."""
    if _EXPERT in record.name:
        return _EXPERT, 0
    return _module(record).rpartition(".")[0], record.shape[1]


def _ignored(
    manifest: Manifest,
    linear: set[str],
    packed: frozenset[str],
) -> tuple[str, ...]:
    """Returns the modules that the library must not expect packed parts of."""
    plain = linear - set(map(_module_of, packed))
    for record in manifest.tensors:
        if record.name in packed:
            continue
        if isinstance(record, Int8Tensor) or _may_be_fused(record, linear):
            plain.add(_module(record))
    return tuple(sorted(plain))


def _notes(
    eligible: Mapping[str, Int8Tensor],
    packed: frozenset[str],
    wide: set[str],
    width: int,
) -> tuple[str, ...]:
    total = len(eligible)
    notes = [f"{len(packed)} of {total} tensors of linear layers have {width} bits a code"]
    if wide:
        beside = total - len(packed) - len(wide)
        first = ", ".join(sorted(wide)[:3])
        notes.append(
            f"{len(wide)} have codes beyond 8 bits and are written plainly, "
            f"and {beside} beside them: {first}"
        )
    return tuple(notes)


def _beyond(
    name: str,
    span: tuple[int, int],
    width: int,
    needed: int | None = None,
) -> UsageError:
    lowest, highest = span
    half = 1 << (width - 1)
    rest = _DENSE
    if needed is not None:
        rest = f"{needed} bits hold all codes of this container"
    return UsageError(
        f"codes do not fit into {width} bits, and none is ever clipped; {rest}",
        tensor=name,
        got=f"{lowest} to {highest}",
        expected=f"{-half} to {half - 1}",
    )


def _module(record: TensorRecord) -> str:
    return _module_of(record.name)


def _module_of(name: str) -> str:
    return name.removesuffix(_SUFFIX)
