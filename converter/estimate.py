"""Predicts a conversion's size without writing: a few tiles of every tensor are encoded, the rest is extrapolated."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codecllm.converter.conversion import ConvertOptions, plan_conversion
from codecllm.converter.encode import Block, blocks_of, encode_block, finish_blocks, needs_scale_pass, scan_block
from codecllm.converter.policy import TensorPlan, plan_lossless
from codecllm.converter.source import SourceModel
from codecllm.formats.schemes.int8 import channel_scales

_SAMPLED_BLOCKS = 2
_HEADER_BYTES = 480
_MANIFEST_BYTES = 500


@dataclass(frozen=True, slots=True)
class TensorEstimate:
    """Predicted size of one tensor.

    Attributes:
        name, dtype, shape: of the source.
        scheme: what it would become.
        source_bytes: its size now.
        stored_bytes: its predicted size in shard and manifest together.
        note: why the scheme is not the one asked for, or None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scheme: str
    source_bytes: int
    stored_bytes: int
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted sizes of a whole conversion; `tensors` in the order of the source, aliases with size 0."""

    tensors: list[TensorEstimate]
    warnings: list[str]

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def stored_bytes(self) -> int:
        """Predicted bytes of shards and manifest."""
        return sum(tensor.stored_bytes for tensor in self.tensors)


def estimate(source: str | Path, options: ConvertOptions | None = None) -> Estimate:
    """Predicts what `convert` would write; nothing is written.

    Each coded tensor is judged by up to two of its blocks (of about a million weights). Raises as `convert` does for a
    source that cannot be read; problems that only a full pass shows (a NaN outside the sample) are not seen.
    """
    options = options or ConvertOptions()
    with SourceModel(source) as model, ThreadPoolExecutor(options.threads()) as executor:
        plan = plan_conversion(model, options)
        stored = {item.name: item for item in executor.map(_estimate_tensor, plan.tensors)}
        tensors = []
        for name, tensor in model.tensors.items():
            alias = plan.aliases.get(name)
            if alias is None:
                tensors.append(stored[name])
                continue
            size = tensor.entry.bytes
            tensors.append(TensorEstimate(name, tensor.dtype.name, tensor.shape, "alias", size, 0, f"same bytes as {alias}"))
        return Estimate(tensors, plan.warnings)


def _estimate_tensor(plan: TensorPlan) -> TensorEstimate:
    source = plan.source
    size, note = source.entry.bytes, plan.fallback
    if plan.scheme != "raw":
        coded = _sample_stored_bytes(plan)
        if coded is None:
            return _estimate_tensor(plan_lossless(source, "int8 cannot represent it", plan.codec))
        size, note = (coded, note) if coded < size else (size, f"{plan.scheme} does not shrink it")
    scheme = plan.scheme if size < source.entry.bytes or plan.scheme == "raw" else "raw"
    overhead = (_HEADER_BYTES if scheme != "raw" else _HEADER_BYTES // 4) + _MANIFEST_BYTES
    return TensorEstimate(source.name, source.dtype.name, source.shape, scheme, source.entry.bytes, size + overhead, note)


def _sample_stored_bytes(plan: TensorPlan) -> int | None:
    """Returns predicted payload and side bytes, or None where int8 cannot represent the sample."""
    blocks = list(blocks_of(plan))
    sampled = blocks if len(blocks) <= _SAMPLED_BLOCKS else [blocks[len(blocks) // 3], blocks[2 * len(blocks) // 3]]
    stored = elements = 0
    for block in sampled:
        encoded = _encode_sample(plan, block)
        if encoded is None:
            return None
        stored += encoded
        elements += block.rows * block.cols
    side = 64 + (4 * plan.channels if plan.scheme == "int8" else 0)
    return stored * plan.source.entry.elements // max(1, elements) + side


def _encode_sample(plan: TensorPlan, block: Block) -> int | None:
    scales = None
    if needs_scale_pass(plan):
        found = scan_block(plan, block)
        if not found.finite or found.tiny:
            return None
        scales = np.ones(plan.channels, np.float32)
        start = block.col if plan.kind == "column" else block.row
        scales[start : start + len(found.absmax)] = channel_scales(found.absmax)
    encoded = encode_block(plan, block, scales)
    if encoded.problem is not None:
        return None
    (encoded,) = finish_blocks([encoded])
    return sum(len(part) for part in (*encoded.slots, *encoded.tables)) + 16 * len(encoded.records)
