"""int8 codes in the layout of the compressed-tensors library.

`pack-quantized`, 8 bits, one scale per output channel.

A weight `X.weight` [out, in] becomes `X.weight_packed` int32 [out, ceil(in / 4)] (code + 128 as an
unsigned byte, four to a word, the first in the lowest bits), `X.weight_scale` float32 [out, 1] and
`X.weight_shape` int64 [2]. Codes and scales are the container's own, so nothing is lost. The
library's other int8 layout, `int-quantized`, is for activations that are quantized too (its
`IntQuantizationCompressor.can_compress` asks for them); ours are not. Read from compressed-tensors
0.20.0: `compressors/pack_quantized`, `compressors/format.py`, `quantization/quant_args.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats.errors import UsageError
from codecllm.formats.manifest.manifest import Manifest
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, TensorRecord

FORMAT = "pack-quantized"
_WORD_CODES = 4
_SUFFIX = ".weight"

PACKED, PACKED_SCALE, PACKED_SHAPE = "weight_packed", "weight_scale", "weight_shape"
"""Names that the layout gives to the parts of a module's weight."""
_EXPERT = ".experts."


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Which tensors of a container are written packed, and the block of config.json that says so.

    Attributes:
        packed: names of the tensors, each the weight of an nn.Linear or of one expert.
        ignore: modules whose weights are written plainly though they are linear, or int8 in the
            container.
    """

    packed: frozenset[str]
    ignore: tuple[str, ...]

    @property
    def quantization_config(self) -> dict[str, Any]:
        """The block of config.json by which transformers, vLLM and others know the layout."""
        weights = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
            "dynamic": False,
        }
        group = {
            "targets": ["Linear"],
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


def plan_layout(manifest: Manifest, linear_modules: Iterable[str]) -> PackedLayout:
    """Decides which tensors are written packed.

    Int8 weights [out, in] of linear modules that share them with no other tensor.

    Tensors with scales for their columns, or with codes beyond 8 bits, are written plainly.

    Experts that the checkpoint holds one by one are written packed too, though the model class may
    fuse them: the library's loaders expect all of a model's experts in one form.

    Args:
        manifest: of the container.
        linear_modules: names of the model's nn.Linear modules.

    Raises:
        UsageError: there is none: the container is lossless, or the model has no such modules.
    """
    if manifest.options.scheme != "int8":
        raise UsageError(
            "compressed-tensors holds int8 weights, and this container is "
            f"{manifest.options.scheme}: "
            "--format safetensors gives every bit back"
        )
    linear = set(linear_modules)
    alias_targets = {
        record.alias_of for record in manifest.tensors if isinstance(record, AliasTensor)
    }
    packed_names = {
        record.name
        for record in manifest.tensors
        if _is_channel_int8(record)
        and record.name not in alias_targets
        and (record.name.removesuffix(_SUFFIX) in linear or _EXPERT in record.name)
    }
    if not packed_names and any(map(_is_beyond_channels, manifest.tensors)):
        raise UsageError(
            "compressed-tensors' int8 has one scale per output channel and codes of 8 bits; the "
            "tensors of this container have "
            "scales for their columns or wider codes: --format safetensors writes them dequantized"
        )
    if not packed_names:
        raise UsageError(
            "no int8 tensor of this container is the weight of a linear module: nothing to export "
            "packed"
        )
    # The library expects packed parts of every linear module that `ignore` does not name.
    plain = linear - {name.removesuffix(_SUFFIX) for name in packed_names}
    plain |= {
        record.name.removesuffix(_SUFFIX)
        for record in manifest.tensors
        if isinstance(record, Int8Tensor) and record.name not in packed_names
    }
    return PackedLayout(frozenset(packed_names), tuple(sorted(plain)))


def pack_codes(codes: NDArray[np.int8]) -> NDArray[np.int32]:
    """Returns int32 [rows, ceil(cols / 4)] words for int8 [rows, cols] codes.

    Missing codes of a last word are zero bits.
    """
    rows, cols = codes.shape
    unsigned = np.zeros((rows, packed_columns(cols) * _WORD_CODES), np.uint8)
    unsigned[:, :cols] = codes.view(np.uint8) ^ np.uint8(0x80)  # two's complement + 128
    return unsigned.view("<i4")


def packed_columns(columns: int) -> int:
    """Returns the number of words that a row of `columns` codes takes.

    >>> packed_columns(5)
    2
    """
    return -(-columns // _WORD_CODES)


def _is_channel_int8(record: TensorRecord) -> bool:
    return (
        isinstance(record, Int8Tensor)
        and len(record.shape) == 2
        and (record.channel_axis, record.channel_kind) == (0, "row")
        and record.name.endswith(_SUFFIX)
        and not _is_beyond_channels(record)
    )


def _is_beyond_channels(record: TensorRecord) -> bool:
    """Whether a tensor has codes beyond one signed byte, or scales beside those of its channels."""
    return isinstance(record, Int8Tensor) and (record.wide or record.xxh3.col_scale is not None)
