"""Predicts the size of a conversion without writing.

Some blocks of every tensor are encoded, the rest is extrapolated.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from codecllm.converter.encode.blocks import Block, blocks_of, needs_scale_pass
from codecllm.converter.encode.encoding import encode_block, scan_block
from codecllm.converter.options import ConvertOptions, Origin
from codecllm.converter.plan.choice import NO_CHOICE, ParamsChoice
from codecllm.converter.plan.conversion_plan import open_source, plan_conversion
from codecllm.converter.plan.policy import plan_lossless
from codecllm.converter.plan.tensor_plan import ParamsProvider, TensorPlan, check_params
from codecllm.converter.rate.overhead import frame_bytes, planned_record_bytes
from codecllm.converter.rate.trial import encoded_bytes
from codecllm.converter.source.selection import LeftFile
from codecllm.converter.source.source import SourceModel
from codecllm.converter.write.manifest import Conversion
from codecllm.formats.schemes.int8 import channel_scales

_SAMPLED_BLOCKS = 2
_TABLE_HEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class TensorEstimate:
    """Predicted size of one tensor.

    Attributes:
        name, dtype, shape: of the source.
        scheme: the one that it would get.
        source_bytes: its size in the source.
        stored_bytes: predicted size of its data, side tensors and manifest record.
        note: the reason why the scheme is not the requested one, or None.
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
    """Predicted sizes of a whole conversion.

    Attributes:
        tensors: in the order of the source; aliases have size 0.
        frame_bytes: headers of the shards, and the manifest without the records of tensors.
        warnings: sentences for the user.
        taken: the files that would be taken as the model's weights, in one line.
        left: files and folders of the source that would not be in the container, and why.
    """

    tensors: list[TensorEstimate]
    frame_bytes: int
    warnings: list[str]
    taken: str
    left: list[LeftFile]

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def stored_bytes(self) -> int:
        """Predicted bytes of shards and manifest."""
        return self.frame_bytes + sum(tensor.stored_bytes for tensor in self.tensors)


def estimate(
    source: str | Path, options: ConvertOptions | None = None, choice: ParamsChoice = NO_CHOICE
) -> Estimate:
    """Predicts the output of `convert` for a local folder; nothing is written.

    See `estimate_model`.
    """
    options = options or ConvertOptions()
    with open_source(source, options) as model:
        return estimate_model(model, options, choice)


def estimate_model(
    model: SourceModel, options: ConvertOptions, choice: ParamsChoice = NO_CHOICE
) -> Estimate:
    """Predicts the output of `convert_model`; nothing is written.

    Each coded tensor is judged by up to two of its blocks (of about a million weights). Problems
    that only a full pass shows (a NaN outside the sample) are not seen.

    Raises:
        CodecLLMError, OSError: as in a conversion, for a source that cannot be read.
    """
    plan = plan_conversion(model, options, accepts_params=choice.provider is not None)
    tensor_plans = [_with_params(tensor_plan, choice.provider) for tensor_plan in plan.tensors]
    with ThreadPoolExecutor(options.threads) as executor:
        estimates = {item.name: item for item in executor.map(_estimate_tensor, tensor_plans)}
    tensors = []
    for name, tensor in model.tensors.items():
        target = plan.aliases.get(name)
        if target is None:
            tensors.append(estimates[name])
            continue
        size, note = tensor.entry.bytes, f"same bytes as {target}"
        tensors.append(
            TensorEstimate(name, tensor.dtype.name, tensor.shape, "alias", size, 0, note)
        )
    frame = frame_bytes(Conversion(model, plan, options, choice, Origin()), set(estimates))
    warnings = [*plan.warnings, *choice.notes]
    return Estimate(tensors, frame, warnings, model.describe_taken(), model.side_files.left)


def sampled_bytes(plan: TensorPlan) -> int:
    """Returns predicted bytes of the data and side tensors of a tensor, from one or two blocks."""
    return _sampled(plan)[1]


def _with_params(plan: TensorPlan, provider: ParamsProvider | None) -> TensorPlan:
    """Returns the plan with the parameters that a conversion would give the tensor."""
    params = provider(plan) if provider is not None and plan.accepts_params else None
    if params is None:
        return plan
    check_params(params, plan)
    return replace(plan, params=params)


def _estimate_tensor(plan: TensorPlan) -> TensorEstimate:
    final_plan, size = _sampled(plan)
    source = final_plan.source
    return TensorEstimate(
        source.name,
        source.dtype.name,
        source.shape,
        final_plan.scheme,
        source.entry.bytes,
        size + planned_record_bytes(final_plan),
        final_plan.fallback,
    )


def _sampled(plan: TensorPlan) -> tuple[TensorPlan, int]:
    """Returns the plan that a conversion ends with, and the predicted bytes of data and sides."""
    source = plan.source
    if plan.scheme == "raw":
        return plan, source.entry.bytes
    coded_size = _coded_bytes(plan)
    if coded_size is None:
        reason = "int8 cannot represent it"
        return _sampled(plan_lossless(source, reason, plan.codec, plan.tile_symbols))
    # As the writer does: a tensor that coding does not shrink is stored raw.
    if coded_size >= source.entry.bytes:
        raw = TensorPlan(source, "raw", fallback=f"{plan.scheme} does not shrink it")
        return raw, source.entry.bytes
    return plan, coded_size


def _coded_bytes(plan: TensorPlan) -> int | None:
    """Returns predicted payload and side bytes, or None where int8 cannot represent the sample."""
    blocks = list(blocks_of(plan))
    if len(blocks) > _SAMPLED_BLOCKS:
        blocks = [blocks[len(blocks) // 3], blocks[2 * len(blocks) // 3]]
    stored_bytes = elements = 0
    for block in blocks:
        block_bytes = _encoded_block_bytes(plan, block)
        if block_bytes is None:
            return None
        stored_bytes += block_bytes
        elements += block.rows * block.cols
    side = _TABLE_HEAD_BYTES
    if plan.scheme == "int8":
        side += 4 * plan.channels if plan.params is None else plan.params.stored_bytes
    return stored_bytes * plan.source.entry.elements // max(1, elements) + side


def _encoded_block_bytes(plan: TensorPlan, block: Block) -> int | None:
    scales = None
    if needs_scale_pass(plan):
        block_scales = scan_block(plan, block)
        if not block_scales.finite or block_scales.tiny:
            return None
        # Only the channels of this block are encoded: the other scales have no effect.
        scales = np.ones(plan.channels, np.float32)
        start = block.col if plan.kind == "column" else block.row
        scales[start : start + len(block_scales.absmax)] = channel_scales(block_scales.absmax)
    encoded_block = encode_block(plan, block, scales)
    if encoded_block.problem == "wide":
        encoded_block = encode_block(replace(plan, wide=True), block, scales)
    if encoded_block.problem is not None:
        return None
    return encoded_bytes(encoded_block)
