"""Exact sizes of parts of a tensor under given quantization parameters.

The trials of a search for a rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from codecllm.converter.encode.blocks import blocks_of
from codecllm.converter.encode.encoding import encode_block
from codecllm.converter.encode.packing import EncodedBlock
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.formats.errors import UsageError


@dataclass(frozen=True, slots=True)
class PackedSize:
    """Exact size of some rows of an int8 tensor under given parameters.

    Attributes:
        elements: weights in these rows.
        stored_bits: bits of their chunks, padding, chunk records and `rans` tables; the rest is
            `overhead.tensor_bytes`.
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
    """Quantizes and packs rows of a tensor as a conversion does, in the calling thread.

    Args:
        plan: the tensor's, as `plan_conversion` gives it, of scheme `int8`.
        params: the parameters to try; not checked against the limits of the format
            (`check_params`).
        first: first block of rows; blocks are the units in which a conversion works
            (`count_blocks`).
        last: block behind the last one; None takes one block.
        wide: whether to use two planes though one may do.

    Raises:
        UsageError: weights are not finite, or some lie too many steps from zero.
    """
    trial_plan = replace(plan, params=params, wide=wide or params.wide)
    blocks = list(blocks_of(trial_plan))[first : first + 1 if last is None else last]
    encoded_blocks = [encode_block(trial_plan, block, None) for block in blocks]
    problems = {block.problem for block in encoded_blocks if block.problem is not None}
    # Codes beyond 127 are no fault of the parameters: two planes hold them.
    if problems == {"wide"}:
        return packed_size(plan, params, first, last, wide=True)
    if problems:
        raise UsageError(
            f"these parameters cannot quantize the tensor ({', '.join(sorted(problems))}): "
            "excluded, it stays lossless",
            tensor=plan.source.name,
        )
    bits = 8 * sum(map(encoded_bytes, encoded_blocks))
    elements = sum(block.rows * block.cols for block in blocks)
    return PackedSize(
        elements, bits, trial_plan.wide or any(block.wide for block in encoded_blocks)
    )


def count_blocks(plan: TensorPlan, params: QuantParams) -> int:
    """Returns the number of blocks that a conversion makes of a tensor with these parameters."""
    return len(list(blocks_of(replace(plan, params=params))))


def encoded_bytes(encoded: EncodedBlock) -> int:
    """Returns the bytes of a block's slots, `rans` tables and chunk records."""
    assert encoded.chunks is not None  # there was no problem
    tables_bytes = sum(map(len, encoded.chunks.tables))
    return encoded.chunks.slots.size + tables_bytes + encoded.chunks.records.nbytes
