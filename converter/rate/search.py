"""Finds the one number k that sets the rate: with it, the container takes the requested bits.

Every tensor is read once; then rows of it (all of a small one) are quantized and packed as the
conversion will do it, under a first guess and then under better ones, and the other rows are judged
by their root mean squares. Then k is fixed; the conversion is one more pass. Nothing here depends
on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from codecllm.converter.encode.blocks import ONE_PASS_COLUMNS
from codecllm.converter.options import MAX_BITS, MIN_BITS, ConvertOptions, Origin, Rate
from codecllm.converter.plan.choice import ParamsChoice
from codecllm.converter.plan.conversion_plan import plan_conversion
from codecllm.converter.plan.params import NARROW_CODES, WIDE_CODES
from codecllm.converter.plan.policy import is_embedding
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.rate.allocation import Statistics
from codecllm.converter.rate.estimate import sampled_bytes
from codecllm.converter.rate.feedback import Feedback
from codecllm.converter.rate.fitted import FittedParams, Scaling, Trial, measure, weights_of
from codecllm.converter.rate.overhead import frame_bytes
from codecllm.converter.rate.sampling import Sampled, sample
from codecllm.converter.rate.stages import now_and_then
from codecllm.converter.source.source import SourceModel
from codecllm.converter.write.manifest import Conversion
from codecllm.formats.errors import UsageError
from codecllm.formats.manifest.records import Calibration

# Shares of the rate: the search ends within the first, mentions more than the second, refuses more
# than the third.
_TOLERANCE, _GOAL, _MISSED = 0.001, 0.005, 0.03

# The deadzone of low rates, in steps; the rate down from which it is this, and the rate from which
# there is none.
_DEADZONE, _DEADZONE_BITS, _NEAREST_BITS = 0.05, 3.0, 4.5

# Where refined codes miss the rate by no more, the corrected step is not measured again.
_NEAR = 0.02

_ROUNDS = 6

# Most doublings of the step away from the first guess.
_FARTHEST = 40.0

# Entropy of a Gaussian in steps of its standard deviation: 0.5 * log2(2 * pi * e).
_GAUSSIAN_BITS = 2.05

_PLACEHOLDER_CALIBRATION = Calibration(kind="self", tokens=4096, seed=0, sha256="0" * 64)


def deadzone_at(bits: float) -> float:
    """Returns the deadzone, in steps, for a rate in bits per weight.

    0.05 up to 3 bits, falling evenly to none at 4.5.

    It trades a little error for fewer bits of the codes: many are 0 at low rates, and a weight just
    beyond half a step costs more as a 1 than it harms as a 0 (docs/bits.md).

    Examples:
        >>> deadzone_at(4.5)
        0.0
    """
    share = (_NEAREST_BITS - bits) / (_NEAREST_BITS - _DEADZONE_BITS)
    return float(np.float32(_DEADZONE * min(1.0, max(0.0, share))))


def fit(
    model: SourceModel,
    options: ConvertOptions,
    statistics: Statistics,
    feedback: Feedback | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> FittedParams:
    """Chooses quantization parameters for all int8 tensors of an opened source.

    Args:
        model: the source.
        options: those of the conversion; `options.rate` is the rate to reach.
        statistics: sensitivities by tensor name; where one is missing, a row's steps follow from
            its weights.
        feedback: refines codes; None leaves them as their steps round them.
        on_stage: called with a sentence when a stage begins, and now and then.

    Raises:
        UsageError: there is no rate, it cannot be reached, or no tensor is quantized.
        SourceError, FormatError, OSError: as in a conversion.
    """
    rate = options.rate
    if rate is None:
        raise UsageError("the options ask for no rate")
    plan = plan_conversion(model, options, accepts_params=True)
    with ThreadPoolExecutor(options.threads) as executor:
        tensors = _sample_all(plan.tensors, statistics, rate, executor)
        if not tensors:
            raise UsageError(
                "no tensor of this model is quantized: there is no rate to choose",
                file=str(model.folder),
            )
        choice = _placeholder_choice(rate, statistics, feedback)
        frame = frame_bytes(Conversion(model, plan, options, choice, Origin()), set(tensors))
        others = [other for other in plan.tensors if other.source.name not in tensors]
        target = rate.target_bits
        if rate.ratio is not None:
            tensor_samples = list(tensors.values())
            target = _bits_for_ratio(
                rate.ratio, model.tensor_bytes, others, tensor_samples, executor
            )
        if target is None:
            fitted_params = _finest(tensors, 8 * frame, executor)
        else:
            fitted_params = _search(tensors, target, 8 * frame, executor)
        fitted_params = replace(
            fitted_params, notes=[*_missing_notes(tensors, statistics), *fitted_params.notes]
        )
        if feedback is None:
            return fitted_params
        fitted_params = replace(
            fitted_params, notes=[*fitted_params.notes, *_unrefined_notes(tensors, feedback)]
        )
        if not any(name in feedback for name in tensors):
            return fitted_params
        refined_params = replace(
            fitted_params, scaling=replace(fitted_params.scaling, feedback=feedback)
        )
        if target is None:
            return refined_params
        return _correct(
            refined_params, target, 8 * frame, executor, on_stage or (lambda text: None)
        )


def _sample_all(
    plans: Sequence[TensorPlan], statistics: Statistics, rate: Rate, executor: Executor
) -> dict[str, Sampled]:
    """Returns the tensors that get parameters, by name.

    Not those with infinite weights or with very long rows.
    """
    eligible = [
        plan for plan in plans if plan.accepts_params and plan.matrix[1] <= ONE_PASS_COLUMNS
    ]

    def sample_one(plan: TensorPlan) -> Sampled | None:
        name = plan.source.name
        limits = _limits(rate, name)
        return sample(plan, statistics.get(name), column_scales=rate.has_columns, limits=limits)

    tensor_samples = executor.map(sample_one, eligible)
    return {tensor.plan.source.name: tensor for tensor in tensor_samples if tensor is not None}


def _limits(rate: Rate, name: str) -> tuple[int, int]:
    """Returns the smallest and the largest code that a tensor may have."""
    if rate.has_columns:
        return WIDE_CODES
    if rate.code_bits is None or is_embedding(name):
        return NARROW_CODES
    largest = (1 << (rate.code_bits - 1)) - 1
    return -largest, largest


def _placeholder_choice(
    rate: Rate, statistics: Statistics, feedback: Feedback | None
) -> ParamsChoice:
    """Returns a choice whose entries in the manifest are as long as those of the final one."""
    has_calibration = bool(statistics) or feedback is not None
    recorded_rate = replace(
        rate, calibrate="self" if has_calibration else "none", refine=feedback is not None
    )
    calibration = _PLACEHOLDER_CALIBRATION if statistics else None
    return ParamsChoice(lambda plan: None, recorded_rate, calibration)


def _bits_for_ratio(
    ratio: float,
    source_bytes: int,
    others: Sequence[TensorPlan],
    tensors: Sequence[Sampled],
    executor: Executor,
) -> float:
    """Returns the bits per quantized weight with which the whole container has this ratio."""
    other_bytes = sum(executor.map(sampled_bytes, others))
    weights = weights_of(tensors)
    bits = 8 * (source_bytes / ratio - other_bytes) / weights
    if not MIN_BITS <= bits <= MAX_BITS:
        least, most = (
            source_bytes / (other_bytes + weights * rate / 8) for rate in (MAX_BITS, MIN_BITS)
        )
        raise UsageError(
            "ratio out of reach", got=ratio, expected=f"{least:.2f} to {most:.2f} for this model"
        )
    return bits


def _search(
    tensors: dict[str, Sampled], target: float, frame_bits: int, executor: Executor
) -> FittedParams:
    """Moves k until the predicted rate is the target.

    Halving the step costs one bit, or a little less at low rates.
    """
    tensor_samples = list(tensors.values())
    elements = [tensor.plan.source.entry.elements for tensor in tensor_samples]
    loose = _loose_factor(tensor_samples, elements)
    spreads = [
        tensor.spread + (0.0 if tensor.factors.absolute else -math.log2(loose))
        for tensor in tensor_samples
    ]
    # First guess: Gaussian weights, whose entropy follows from rms / step.
    guess = float(np.average(spreads, weights=elements)) + _GAUSSIAN_BITS - target
    log_scale = guess
    scaling = Scaling(1.0, loose, deadzone_at(target))
    trials: list[Trial] = []
    for _ in range(_ROUNDS):
        bits, wide = measure(tensor_samples, replace(scaling, scale=2.0**log_scale), executor)
        trials.append(Trial(log_scale, bits + frame_bits / sum(elements), wide))
        if trials[-1].miss(target) < _TOLERANCE:
            break
        log_scale += (trials[-1].bits - target) / _slope(trials)
        # Tables of a few weights may cost more than any step can save.
        log_scale = min(max(log_scale, guess - _FARTHEST), guess + _FARTHEST)
    # The last trial need not be the nearest one.
    best = min(trials, key=lambda trial: abs(trial.bits - target))
    if best.miss(target) > _MISSED:
        raise UsageError(
            "this rate cannot be reached",
            got=f"{best.bits:.3f} bits per weight",
            expected=f"{target:.3f}",
        )
    notes = []
    if best.miss(target) > _GOAL:
        notes.append(f"the nearest rate that was found is {best.bits:.3f} bits per weight")
    fitted_scaling = replace(scaling, scale=2.0**best.log_scale)
    return FittedParams(best.bits, notes, fitted_scaling, tensors, best.wide)


def _finest(tensors: dict[str, Sampled], frame_bits: int, executor: Executor) -> FittedParams:
    """Takes the finest steps with which every code is within its limits."""
    tensor_samples = list(tensors.values())
    scaling = Scaling(0.0, 1.0, 0.0)
    bits, wide = measure(tensor_samples, scaling, executor)
    rate = bits + frame_bits / weights_of(tensor_samples)
    return FittedParams(rate, [], scaling, tensors, wide)


def _correct(
    fitted: FittedParams,
    target: float,
    frame_bits: int,
    executor: Executor,
    tell: Callable[[str], None],
) -> FittedParams:
    """Moves k until refined codes have the target rate; their rate is near that of rounded codes.

    A correction of less than 2 % is not measured again: the error that is left is far below the
    tolerance.
    """
    tensors = list(fitted.tensors.values())
    scaling = fitted.scaling
    trials: list[Trial] = []
    while len(trials) < _ROUNDS:
        tell("refining: a sample of every tensor" + (", with corrected steps" if trials else ""))
        advance = now_and_then(tell, "refining: {} of {} tensors")
        bits, wide = measure(tensors, scaling, executor, advance)
        trial = Trial(math.log2(scaling.scale), bits + frame_bits / weights_of(tensors), wide)
        trials.append(trial)
        if trial.miss(target) < _TOLERANCE:
            return replace(fitted, bits=trial.bits, scaling=scaling, wide=wide)
        scaling = scaling.times(2.0 ** ((trial.bits - target) / _slope(trials)))
        if trial.miss(target) < _NEAR:
            break
    return replace(fitted, bits=target, scaling=scaling, wide=trials[-1].wide)


def _slope(trials: Sequence[Trial]) -> float:
    """Returns the bits per halving of the step, from the last two trials."""
    if len(trials) < 2 or trials[-1].log_scale == trials[-2].log_scale:
        return 1.0
    last, before = trials[-1], trials[-2]
    slope = (before.bits - last.bits) / (last.log_scale - before.log_scale)
    # Noise between two close trials must not throw the next one far off.
    return min(1.5, max(0.3, slope))


def _loose_factor(tensors: Sequence[Sampled], elements: Sequence[int]) -> float:
    """Returns the typical step / rms of a row, of tensors whose level is known.

    The others get it too. 1 if none is known.
    """
    known_spreads = [
        (tensor.spread, size)
        for tensor, size in zip(tensors, elements, strict=True)
        if tensor.factors.absolute
    ]
    if not known_spreads:
        return 1.0
    spreads, sizes = zip(*known_spreads, strict=True)
    return float(2.0 ** -np.average(spreads, weights=sizes))


def _missing_notes(tensors: dict[str, Sampled], statistics: Statistics) -> list[str]:
    """Says which tensors have no calibration statistics, where others have."""
    bare = [
        name
        for name, tensor in tensors.items()
        if not tensor.factors.absolute and name not in statistics
    ]
    if not statistics or not bare:
        return []
    count = f"{len(bare)} of {len(tensors)} tensors have no calibration statistics"
    return [f"{count}, their rows decide: {', '.join(bare[:3])}"]


def _unrefined_notes(tensors: Collection[str], feedback: Feedback) -> list[str]:
    """Says which tensors are not refined."""
    bare = [name for name in tensors if name not in feedback]
    if not bare:
        return []
    count = f"{len(bare)} of {len(tensors)} tensors are rounded without refinement"
    return [f"{count} (no linear layer of that name and shape was seen): {', '.join(bare[:3])}"]
