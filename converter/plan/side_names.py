"""Plainer schemes for tensors whose side tensors would get the name of another tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from codecllm.converter.plan.policy import plan_lossless
from codecllm.converter.plan.tensor_plan import TensorPlan


def without_clashes(plans: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Returns the plans, with a plainer scheme where a side tensor's name is taken (SPEC.md 4).

    A name is taken by a tensor of the source, or by a side tensor of an earlier one. `int8` gives
    way to `lossless`, which has fewer side tensors, and that to `raw`, which has none.
    """
    used_names = {plan.source.name for plan in plans}
    final_plans = []
    for plan in plans:
        # The last candidate, `raw`, has no side tensors: the loop always ends with one that fits.
        for candidate in _candidates(plan):
            names = _side_names(candidate)
            if used_names.isdisjoint(names):
                break
        used_names.update(names)
        final_plans.append(candidate)
    return final_plans


def _candidates(plan: TensorPlan) -> Iterator[TensorPlan]:
    yield plan
    reason = f"{plan.scheme}: the name of a side tensor belongs to another tensor"
    if plan.scheme == "int8":
        yield plan_lossless(plan.source, reason, plan.codec, plan.tile_symbols)
    yield TensorPlan(plan.source, "raw", fallback=reason)


def _side_names(plan: TensorPlan) -> list[str]:
    if plan.scheme == "raw":
        return []
    return [side.name_for(plan.source.name) for side in plan.possible_sides]
