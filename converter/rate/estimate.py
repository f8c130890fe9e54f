"""Predicts a conversion's size without writing: a few tiles of every tensor are encoded, the rest is extrapolated.

`sample_steps` is what a search for steps needs: the exact size of some rows of a tensor under steps that it may try.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from codecllm.converter.conversion import ConvertOptions, plan_conversion
from codecllm.converter.encode.blocks import Block, blocks_of, needs_scale_pass
from codecllm.converter.encode.encoding import encode_block, scan_block
from codecllm.converter.encode.packing import EncodedBlock
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.policy import plan_lossless
from codecllm.converter.plan.tensor_plan import TensorPlan, check_params
from codecllm.converter.source.selection import LeftFile
from codecllm.converter.source.source import SourceModel
from codecllm.formats.errors import UsageError
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
    taken: str
    left: list[LeftFile]

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
    with (
        SourceModel(source, view=options.scheme, with_code=options.with_code) as model,
        ThreadPoolExecutor(options.threads()) as executor,
    ):
        plan = plan_conversion(model, options)
        stored = {
            item.name: item
            for item in executor.map(estimate_tensor, _with_params(plan.tensors, options))
        }
        tensors = []
        for name, tensor in model.tensors.items():
            alias = plan.aliases.get(name)
            if alias is None:
                tensors.append(stored[name])
                continue
            size = tensor.entry.bytes
            tensors.append(
                TensorEstimate(
                    name,
                    tensor.dtype.name,
                    tensor.shape,
                    "alias",
                    size,
                    0,
                    f"same bytes as {alias}",
                )
            )
        return Estimate(tensors, plan.warnings, model.describe_taken(), model.side_files.left)


@dataclass(frozen=True, slots=True)
class PackedSize:
    """Exact size of some rows of an int8 tensor under given steps.

    Attributes:
        elements: weights in these rows.
        stored_bits: bits of their chunks, padding, chunk records and `rans` tables; the rest is `tensor_bytes`.
        wide: whether their codes need two planes.
    """

    elements: int
    stored_bits: int
    wide: bool


def packed_size(
    plan: TensorPlan,
    params: QuantParams,
    first: int = 0,
    last: int | None = None,
    *,
    wide: bool = False,
) -> PackedSize:
    """Quantizes and packs rows of a tensor as a conversion with these steps would, in the calling thread.

    Args:
        plan: the tensor's, as `plan_conversion` gives it, of scheme `int8`.
        params: the parameters to try; not checked against the limits of the format (`check_params`).
        first: first block of rows; blocks are the units in which a conversion works (`blocks`).
        last: block behind the last one; None takes one block.
        wide: whether to use two planes though one may do.

    Raises:
        UsageError: weights are not finite, or some lie too many steps from zero.
    """
    chosen = replace(plan, params=params, wide=wide or params.wide)
    own = list(blocks_of(chosen))[first : first + 1 if last is None else last]
    encoded = [encode_block(chosen, block, None) for block in own]
    problems = {one.problem for one in encoded if one.problem is not None}
    if problems == {"wide"}:
        return packed_size(plan, params, first, last, wide=True)
    if problems:
        raise UsageError(
            f"these steps cannot quantize the tensor ({', '.join(sorted(problems))})",
            tensor=plan.source.name,
        )
    bits = 8 * sum(map(_encoded_bytes, encoded))
    return PackedSize(
        sum(block.rows * block.cols for block in own),
        bits,
        chosen.wide or any(one.wide for one in encoded),
    )


def blocks(plan: TensorPlan, params: QuantParams) -> int:
    """Returns how many blocks of rows a conversion makes of a tensor with these steps."""
    return len(list(blocks_of(replace(plan, params=params))))


def _with_params(plans: list[TensorPlan], options: ConvertOptions) -> Iterator[TensorPlan]:
    """Gives tensors the steps that a conversion would give them."""
    for plan in plans:
        params = options.steps(plan) if options.steps is not None and plan.accepts_params else None
        if params is not None:
            check_params(params, plan)
        yield plan if params is None else replace(plan, params=params)


def _encoded_bytes(encoded: EncodedBlock) -> int:
    return sum(len(part) for part in (*encoded.slots, *encoded.tables)) + 16 * len(encoded.records)


def estimate_tensor(plan: TensorPlan) -> TensorEstimate:
    """Predicts the size of one tensor under its plan, from two of its blocks."""
    source = plan.source
    size, note = source.entry.bytes, plan.fallback
    if plan.scheme != "raw":
        coded = _sample_stored_bytes(plan)
        if coded is None:
            return estimate_tensor(
                plan_lossless(source, "int8 cannot represent it", plan.codec, plan.tile_symbols)
            )
        size, note = (coded, note) if coded < size else (size, f"{plan.scheme} does not shrink it")
    scheme = plan.scheme if size < source.entry.bytes or plan.scheme == "raw" else "raw"
    whole = size + overhead_bytes(scheme)
    return TensorEstimate(
        source.name, source.dtype.name, source.shape, scheme, source.entry.bytes, whole, note
    )


def overhead_bytes(scheme: str) -> int:
    """Returns what `estimate_tensor` adds for a tensor's part of header and manifest."""
    return (_HEADER_BYTES if scheme != "raw" else _HEADER_BYTES // 4) + _MANIFEST_BYTES


def _sample_stored_bytes(plan: TensorPlan) -> int | None:
    """Returns predicted payload and side bytes, or None where int8 cannot represent the sample."""
    blocks = list(blocks_of(plan))
    sampled = (
        blocks
        if len(blocks) <= _SAMPLED_BLOCKS
        else [blocks[len(blocks) // 3], blocks[2 * len(blocks) // 3]]
    )
    stored = elements = 0
    for block in sampled:
        encoded = _encode_sample(plan, block)
        if encoded is None:
            return None
        stored += encoded
        elements += block.rows * block.cols
    side = 64
    if plan.scheme == "int8":
        side += 4 * plan.channels if plan.params is None else plan.params.stored_bytes
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
    if encoded.problem == "wide":
        encoded = encode_block(replace(plan, wide=True), block, scales)
    if encoded.problem is not None:
        return None
    return _encoded_bytes(encoded)
