"""Quantization parameters of all tensors as a function of one scale k, and their rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import ClassVar

from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.overhead import tensor_bytes
from codecllm.converter.rate.sampling import Sampled
from codecllm.converter.rate.trial import packed_size


@dataclass(frozen=True, slots=True)
class Scaling:
    """Turns relative steps into steps.

    Attributes:
        scale: k.
        loose: step / rms of a row where `scale` is 1, for tensors whose level is not known.
        deadzone: of all tensors, in steps.
        feedback: refines codes, or None.
    """

    scale: float
    loose: float
    deadzone: float
    feedback: Feedback | None = None

    def params(self, sampled: Sampled, plan: TensorPlan) -> QuantParams:
        """Returns the parameters of a tensor; `plan` is its plan, of a source that is open."""
        # Without a level from gradients the typical step / rms of the other tensors stands in.
        scale = self.scale if sampled.factors.absolute else self.scale * self.loose
        params = sampled.params(scale, self.deadzone)
        return params if self.feedback is None else self.feedback.refine(plan, params)

    def times(self, factor: float) -> Scaling:
        """Returns the scaling with k multiplied by `factor`."""
        return replace(self, scale=self.scale * factor)


@dataclass(frozen=True, slots=True, eq=False)
class FittedParams:
    """Parameters for every tensor of a source: a `ParamsProvider`.

    Attributes:
        bits: predicted bits per quantized weight, everything counted.
        notes: sentences for the user.
        scaling: how steps follow from relative ones.
        tensors: name -> the tensor as it was sampled.
        wide: names of the tensors whose sampled codes pass 127.
    """

    bits: float
    notes: list[str]
    scaling: Scaling
    tensors: Mapping[str, Sampled]
    wide: frozenset[str]

    repeatable: ClassVar[bool] = True
    """The same source, options and calibration give the same parameters.

    So a killed conversion can go on.
    """

    def __call__(self, plan: TensorPlan) -> QuantParams | None:
        """Returns the parameters of a tensor; None where it has weights that are not finite."""
        tensor_sample = self.tensors.get(plan.source.name)
        if tensor_sample is None:
            return None
        params = self.scaling.params(tensor_sample, plan)
        return replace(params, wide=params.wide or plan.source.name in self.wide)


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial of a search.

    Attributes:
        log_scale: log2 of k.
        bits: bits per weight that it gave.
        wide: names of the tensors whose codes pass 127.
    """

    log_scale: float
    bits: float
    wide: frozenset[str]

    def miss(self, target: float) -> float:
        """Returns the distance to a target rate, as a share of it."""
        return abs(self.bits / target - 1)


def weights_of(tensors: Sequence[Sampled]) -> int:
    """Returns the number of weights of some tensors."""
    return sum(tensor.plan.source.entry.elements for tensor in tensors)


def measure(
    tensors: Sequence[Sampled],
    scaling: Scaling,
    executor: Executor,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, frozenset[str]]:
    """Quantizes and packs a sample of every tensor.

    Args:
        tensors: the tensors.
        scaling: the steps to try.
        executor: runs the tensors.
        on_tensor: called with the tensors done and all of them.

    Returns:
        Predicted bits per weight over all tensors, and the names of those whose codes pass 127.
    """

    def measure_one(sampled: Sampled) -> tuple[float, bool]:
        params = scaling.params(sampled, sampled.plan)
        sizes = [packed_size(sampled.plan, params, number) for number in sampled.blocks]
        average = sum(size.stored_bits for size in sizes) / sum(size.elements for size in sizes)
        wide = any(size.wide for size in sizes)
        data_bits = (average + sampled.beyond_sample(params)) * sampled.plan.source.entry.elements
        return data_bits + 8 * tensor_bytes(sampled.plan, params, wide=wide), wide

    bits, wide = [], set()
    for tensor_sample, (tensor_bits, is_wide) in zip(
        tensors, executor.map(measure_one, tensors), strict=True
    ):
        bits.append(tensor_bits)
        if is_wide:
            wide.add(tensor_sample.plan.source.name)
        on_tensor(len(bits), len(tensors))
    return math.fsum(bits) / weights_of(tensors), frozenset(wide)
