"""Finds tensors that the source stores twice (tied weights saved apart).

The container stores them once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.tensors import SourceTensor, same_bytes

# Tied weights are embeddings; small tensors, such as biases of zeros, are equal by chance.
MIN_ALIAS_BYTES = 1 << 16
_PROBE_BYTES = 4096


def find_aliases(plans: Iterable[TensorPlan]) -> dict[str, str]:
    """Returns name -> name of an earlier tensor with the same dtype, shape, bytes and plan.

    Only tensors of 64 KiB or more are compared: first 4 KiB at their start and in their middle,
    then all of it.
    """
    groups: dict[tuple[object, ...], list[SourceTensor]] = defaultdict(list)
    aliases: dict[str, str] = {}
    for plan in plans:
        source = plan.source
        if source.entry.bytes < MIN_ALIAS_BYTES:
            continue
        # The probe rules out nearly all pairs before whole tensors are read.
        key = (source.dtype.name, source.shape, plan.scheme, plan.axis, plan.kind, _probe(source))
        twin = next((other for other in groups[key] if same_bytes(source, other)), None)
        if twin is not None:
            aliases[source.name] = twin.name
        else:
            groups[key].append(source)
    return aliases


def _probe(source: SourceTensor) -> bytes:
    middle = source.entry.bytes // 2
    return source.read_bytes(0, _PROBE_BYTES) + source.read_bytes(middle, middle + _PROBE_BYTES)
