"""Finds the one number that sets the rate: steps of all tensors such that the container takes the bits that were asked for.

Every tensor is read once; then rows of it (all of a small one) are quantized and packed as the conversion will do it, under a
first guess and then under better ones, and the other rows are judged by their root mean squares. Then the steps are fixed; the
conversion is one more pass. Nothing here depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from codecllm.converter.conversion import ConvertOptions, plan_conversion
from codecllm.converter.encode.blocks import ONE_PASS_COLUMNS
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.rate.allocation import Statistics
from codecllm.converter.rate.estimate import estimate_tensor, overhead_bytes, packed_size
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.overhead import frame_bytes, tensor_bytes
from codecllm.converter.rate.sampling import Sampled, sample
from codecllm.converter.rate.stages import now_and_then
from codecllm.converter.source.source import SourceModel
from codecllm.formats.errors import UsageError
from codecllm.formats.manifest.records import Calibration

MIN_BITS, MAX_BITS = 2.0, 8.0
"""The rates that can be asked for, in bits per weight."""

_TOLERANCE, _GOAL, _MISSED = 0.001, 0.005, 0.03
"""Shares of the rate: the search ends within the first, mentions more than the second, refuses more than the third."""

_DEADZONE, _DEADZONE_BITS, _NEAREST_BITS = 0.05, 3.0, 4.5
"""The deadzone of low rates, in steps; the rate down from which it is this, and the rate from which there is none."""

_NEAR = 0.02
"""Where refined codes miss the rate by no more, the corrected step is not measured again."""

_ROUNDS = 6
_GAUSSIAN_BITS = (
    2.05  # entropy of a Gaussian in steps of its standard deviation, 0.5 * log2(2 * pi * e)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a conversion is to reach: `bits` per weight over the quantized tensors, or `ratio` over all; one of them is None."""

    bits: float | None = None
    ratio: float | None = None

    def check(self, options: ConvertOptions) -> None:
        """Refuses what cannot be meant.

        Raises:
            UsageError: not exactly one of the two, out of range, or together with `lossless`.
        """
        if (self.bits is None) == (self.ratio is None):
            raise UsageError(
                "give bits or ratio, one of them", got=f"bits {self.bits}, ratio {self.ratio}"
            )
        if options.scheme != "int8":
            raise UsageError(
                "bits and ratio need scheme int8: lossless has no rate to choose",
                got=options.scheme,
            )
        if self.bits is not None and not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(
                "bits per weight", got=self.bits, expected=f"{MIN_BITS:g} to {MAX_BITS:g}"
            )
        if self.ratio is not None and not (math.isfinite(self.ratio) and self.ratio > 1):
            raise UsageError("ratio", got=self.ratio, expected="more than 1")


def deadzone_at(bits: float) -> float:
    """Returns the deadzone, in steps, for a rate in bits per weight: 0.05 up to 3 bits, falling evenly to none at 4.5.

    It trades a little error for fewer bits of the codes: many are 0 at low rates, and a weight just beyond half a step costs
    more as a 1 than it harms as a 0 (docs/bits.md).
    """
    share = (_NEAREST_BITS - bits) / (_NEAREST_BITS - _DEADZONE_BITS)
    return float(np.float32(_DEADZONE * min(1.0, max(0.0, share))))


@dataclass(frozen=True, slots=True)
class _Choice:
    """What makes steps of relative ones.

    Attributes:
        scale: k.
        loose: step / rms of a row where `scale` is 1, for tensors whose level is not known.
        deadzone: of all tensors.
        feedback: refines codes, or None.
    """

    scale: float
    loose: float
    deadzone: float
    feedback: Feedback | None = None

    def params(self, held: Sampled, plan: TensorPlan) -> QuantParams:
        """Returns the steps of a tensor; `plan` is its plan, of a source that is open."""
        params = held.params(
            self.scale if held.factors.absolute else self.scale * self.loose, self.deadzone
        )
        return params if self.feedback is None else self.feedback.refine(plan, params)


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """Steps for every tensor of a source, as a conversion's `steps`.

    Attributes:
        bits: predicted bits per quantized weight, everything counted.
        notes: sentences for the user.
    """

    bits: float
    notes: list[str]
    _choice: _Choice
    _tensors: dict[str, Sampled]
    _wide: frozenset[str]

    def __call__(self, plan: TensorPlan) -> QuantParams | None:
        """Returns the steps of a tensor; None where it has weights that are not finite."""
        held = self._tensors.get(plan.source.name)
        if held is None:
            return None
        params = self._choice.params(held, plan)
        return replace(params, wide=params.wide or plan.source.name in self._wide)


def fit(
    source: str | Path,
    options: ConvertOptions,
    target: Target,
    statistics: Statistics,
    feedback: Feedback | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Fitted:
    """Chooses steps for all int8 tensors of a source.

    Args:
        source: folder with safetensors weights.
        options: those of the conversion.
        target: what to reach.
        statistics: sensitivities by tensor name; where one is missing, a row's steps follow from its weights.
        feedback: refines codes; None leaves them as their steps round them.
        on_stage: called with a sentence when a stage begins, and now and then.

    Raises:
        UsageError: the target cannot be meant or reached.
        SourceError, FormatError, OSError: as in a conversion.
    """
    target.check(options)
    with_params = replace(options, steps=lambda plan: None)
    with (
        SourceModel(source, view=options.scheme, with_code=options.with_code) as model,
        ThreadPoolExecutor(options.threads()) as executor,
    ):
        plan = plan_conversion(model, with_params)
        plans = plan.tensors
        accepts_params = [
            plan for plan in plans if plan.accepts_params and plan.matrix[1] <= ONE_PASS_COLUMNS
        ]
        prepared = list(
            executor.map(
                lambda plan: sample(plan, statistics.get(plan.source.name)), accepts_params
            )
        )
        tensors = {held.plan.source.name: held for held in prepared if held is not None}
        if not tensors:
            raise UsageError(
                "no tensor of this model is quantized: there is no rate to choose", file=str(source)
            )
        others = [plan for plan in plans if plan.source.name not in tensors]
        recorded = replace(
            _recorded(with_params, target, statistics), refine=None if feedback is None else True
        )
        frame = frame_bytes(model, plan, recorded, set(tensors))
        wanted = target.bits
        if wanted is None:
            wanted = _bits_for_ratio(
                float(target.ratio or 0), model.tensor_bytes, others, tensors, executor
            )
        held = list(tensors.values())
        fitted = _search(held, wanted, 8 * frame, executor, _notes(tensors, statistics))
        if feedback is None:
            return fitted
        fitted = replace(fitted, notes=[*fitted.notes, *_unrefined(held, feedback)])
        if not any(name in feedback for name in tensors):
            return fitted
        fitted = replace(fitted, _choice=replace(fitted._choice, feedback=feedback))
        return _corrected(fitted, wanted, 8 * frame, executor, on_stage or (lambda text: None))


def _recorded(options: ConvertOptions, target: Target, statistics: Statistics) -> ConvertOptions:
    """Returns the options with what the manifest will say of the request."""
    asked = replace(
        options, bits=target.bits, ratio=target.ratio, calibrate="self" if statistics else "none"
    )
    stand_in = (
        Calibration(kind="self", tokens=4096, seed=0, sha256="0" * 64) if statistics else None
    )
    return replace(asked, calibration=options.calibration or stand_in)


def _notes(tensors: dict[str, Sampled], statistics: Statistics) -> list[str]:
    bare = [
        name
        for name, held in tensors.items()
        if not held.factors.absolute and name not in statistics
    ]
    if not statistics or not bare:
        return []
    return [
        f"{len(bare)} of {len(tensors)} tensors have no calibration statistics, their rows decide: {', '.join(bare[:3])}"
    ]


def _bits_for_ratio(
    ratio: float,
    source_bytes: int,
    others: list[TensorPlan],
    tensors: dict[str, Sampled],
    executor: Executor,
) -> float:
    kept = sum(
        item.stored_bytes - overhead_bytes(item.scheme)
        for item in executor.map(estimate_tensor, others)
    )
    weights = sum(held.plan.source.entry.elements for held in tensors.values())
    bits = 8 * (source_bytes / ratio - kept) / weights
    if not MIN_BITS <= bits <= MAX_BITS:
        ratios = [source_bytes / (kept + weights * rate / 8) for rate in (MAX_BITS, MIN_BITS)]
        raise UsageError(
            "ratio out of reach",
            got=ratio,
            expected=f"{ratios[0]:.2f} to {ratios[1]:.2f} for this model",
        )
    return bits


def _search(
    tensors: list[Sampled], wanted: float, frame: int, executor: Executor, notes: list[str]
) -> Fitted:
    """Moves k until the predicted rate is the one wanted: halving the step costs one bit, or a little less at low rates."""
    elements = [held.plan.source.entry.elements for held in tensors]
    loose = _loose_factor(tensors, elements)
    own = [held.spread + (0.0 if held.factors.absolute else -math.log2(loose)) for held in tensors]
    log_k = float(np.average(own, weights=elements)) + _GAUSSIAN_BITS - wanted
    choice = _Choice(1.0, loose, deadzone_at(wanted))
    tried: list[tuple[float, float, frozenset[str]]] = []
    for _ in range(_ROUNDS):
        bits, wide = _measure(tensors, replace(choice, scale=2.0**log_k), executor)
        bits += frame / sum(elements)
        tried.append((log_k, bits, wide))
        if abs(bits / wanted - 1) < _TOLERANCE:
            break
        log_k += (bits - wanted) / _slope(tried)
    log_k, bits, wide = min(tried, key=lambda one: abs(one[1] - wanted))
    if abs(bits / wanted - 1) > _MISSED:
        raise UsageError(
            "this rate cannot be reached",
            got=f"{bits:.3f} bits per weight",
            expected=f"{wanted:.3f}",
        )
    if abs(bits / wanted - 1) > _GOAL:
        notes = [*notes, f"the nearest rate that was found is {bits:.3f} bits per weight"]
    return Fitted(
        bits,
        notes,
        replace(choice, scale=2.0**log_k),
        {held.plan.source.name: held for held in tensors},
        wide,
    )


def _corrected(
    fitted: Fitted, wanted: float, frame: int, executor: Executor, tell: Callable[[str], None]
) -> Fitted:
    """Moves k until refined codes have the rate, which is nearly that of the others."""
    tensors, choice = list(fitted._tensors.values()), fitted._choice
    tried: list[tuple[float, float, frozenset[str]]] = []
    bits, wide = fitted.bits, fitted._wide
    for number in range(_ROUNDS):
        tell("refining: a sample of every tensor" + (", with corrected steps" if number else ""))
        bits, wide = _measure(
            tensors, choice, executor, now_and_then(tell, "refining: {} of {} tensors")
        )
        bits += frame / sum(held.plan.source.entry.elements for held in tensors)
        tried.append((math.log2(choice.scale), bits, wide))
        missed = bits / wanted - 1
        if abs(missed) < _TOLERANCE:
            break
        choice = replace(choice, scale=choice.scale * 2.0 ** ((bits - wanted) / _slope(tried)))
        bits = wanted
        if abs(missed) < _NEAR:
            break
    return replace(fitted, bits=bits, _choice=choice, _wide=wide)


def _unrefined(tensors: list[Sampled], feedback: Feedback) -> list[str]:
    names = [held.plan.source.name for held in tensors]
    bare = [name for name in names if name not in feedback]
    if not bare:
        return []
    text = f"{len(bare)} of {len(names)} tensors are rounded without refinement (no linear layer of that name and shape was seen)"
    return [f"{text}: {', '.join(bare[:3])}"]


def _slope(tried: Sequence[tuple[float, float, frozenset[str]]]) -> float:
    """Bits per halving of the step, from the last two trials."""
    if len(tried) < 2 or tried[-1][0] == tried[-2][0]:
        return 1.0
    return min(1.5, max(0.3, (tried[-2][1] - tried[-1][1]) / (tried[-1][0] - tried[-2][0])))


def _loose_factor(tensors: list[Sampled], elements: list[int]) -> float:
    """Step / rms of a row, as typical for tensors whose level is known; the others get it too. 1 where none is known."""
    known = [
        (held.spread, size)
        for held, size in zip(tensors, elements, strict=True)
        if held.factors.absolute
    ]
    if not known:
        return 1.0
    return float(
        2.0 ** -np.average([spread for spread, _ in known], weights=[size for _, size in known])
    )


def _measure(
    tensors: list[Sampled],
    choice: _Choice,
    executor: Executor,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, frozenset[str]]:
    """Returns predicted bits per weight over all tensors, and the names of those whose codes pass 127."""

    def one(held: Sampled) -> tuple[float, bool]:
        params = choice.params(held, held.plan)
        sizes = [packed_size(held.plan, params, number) for number in held.blocks]
        average = sum(size.stored_bits for size in sizes) / sum(size.elements for size in sizes)
        bits = (average + held.beyond_sample(params)) * held.plan.source.entry.elements
        wide = any(size.wide for size in sizes)
        return bits + 8 * tensor_bytes(held.plan, params, wide=wide), wide

    measured = []
    for result in executor.map(one, tensors):
        measured.append(result)
        on_tensor(len(measured), len(tensors))
    weights = sum(held.plan.source.entry.elements for held in tensors)
    names = [held.plan.source.name for held in tensors]
    wide = frozenset(name for name, (_, is_wide) in zip(names, measured, strict=True) if is_wide)
    return math.fsum(bits for bits, _ in measured) / weights, wide
