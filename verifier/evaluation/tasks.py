"""`codecllm eval --tasks`: a base model and candidates of it, scored on tasks with answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from codecllm.formats.arguments.check import check_arguments, integer, optional, sequence, text
from codecllm.formats.errors import UsageError
from codecllm.loader.places import device_of
from codecllm.loader.torch_tensors import check_dtype
from codecllm.verifier.evaluation.candidates import Candidate, find_candidate
from codecllm.verifier.evaluation.evaluate import tokenizer_of
from codecllm.verifier.evaluation.harness import Answer, Harness, TaskResult

OnModel = Callable[[str, int, int], None]
"""Called with a model's name, the models done and all of them."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task, of one model.

    Attributes:
        model: name, as it was given.
        kind: of the model, as in `Score`.
        bits_per_weight: stored bits of all tensors / weights.
        task: name.
        metric: name; with its filter behind a comma where it has one.
        value: of the metric, as the harness gives it: accuracies from 0 to 1.
        stderr: standard error of it; None where the harness gives none.
        examples: that were asked.
        agreement: share of examples to which the model answers as the base does, right or wrong;
            None where the task has no answers, as a perplexity.
    """

    model: str
    kind: str
    bits_per_weight: float
    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int
    agreement: float | None


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """The scores of the base and of all candidates.

    Attributes:
        base: name of the base model.
        dtype: in which the models computed.
        device: on which.
        limit: examples of each task at most; None: all of them.
        scores: by task and metric, the base's first.
    """

    base: str
    dtype: str
    device: str
    limit: int | None
    scores: list[TaskScore]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)


def evaluate_tasks(
    base: str | Path,
    candidates: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    workers: int | None = None,
    progress: OnModel | None = None,
) -> TaskEvaluation:
    """Runs tasks of lm-evaluation-harness on a base model and on candidates of it.

    One model is in memory at a time. All read tokens of the base's tokenizer and compute in
    `dtype`, so that only their weights differ.

    Args:
        base: Hugging Face folder, Hub id, GGUF file or container.
        candidates: the same; none scores the base alone.
        tasks: names of tasks, groups or tags, or YAML files; see `Harness`.
        limit: examples of each task at most.
        batch_size: sequences that a model reads at once.
        dtype: dtype of weights and arithmetic.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        workers: decoding threads.
        progress: called before each model, and at the end.

    Raises:
        UsageError: no task was given, or there is none of that name; the base is no causal language
            model with a tokenizer.
        UnsupportedEnvironmentError: lm-eval is missing, or a task cannot be loaded or fails.
        CodecLLMError: a model cannot be loaded.
    """
    # Before tasks are loaded, which takes long.
    check_arguments(base=base, candidates=candidates, workers=workers, progress=progress)
    sequence(text)(tasks, "tasks")
    limit = optional(integer(1))(limit, "limit")
    batch_size = integer(1)(batch_size, "batch_size")
    check_dtype(dtype)
    if not tasks:
        raise UsageError("no task was given")
    place = device_of(device)
    harness = Harness(tasks)
    models = [find_candidate(name) for name in (base, *candidates)]
    tokenizer = None
    scores: list[TaskScore] = []
    answers: dict[str, dict[tuple[int, str], Answer]] = {}
    for number, candidate in enumerate(models):
        if progress is not None:
            progress(candidate.name, number, len(models))
        model = candidate.load(dtype, workers, place)
        # The first one is the base, whose tokens all of them read.
        tokenizer = tokenizer or tokenizer_of(candidate, model)
        results = harness.run(model, tokenizer, limit=limit, batch_size=batch_size)
        # The next model needs the memory.
        del model
        answers = answers or {task: result.answers for task, result in results.items()}
        scores += _scores(candidate, results, answers)
    if progress is not None:
        progress(models[-1].name, len(models), len(models))
    scores.sort(key=lambda score: (score.task, score.metric))
    name = str(dtype).removeprefix("torch.")
    return TaskEvaluation(str(base), name, str(place), limit, scores)


def _scores(
    candidate: Candidate,
    results: dict[str, TaskResult],
    expected: dict[str, dict[tuple[int, str], Answer]],
) -> list[TaskScore]:
    bits = candidate.bits().per_weight
    scores = []
    for task, result in results.items():
        theirs = expected[task]
        agreement = (
            sum(result.answers.get(key) == answer for key, answer in theirs.items()) / len(theirs)
            if theirs
            else None
        )
        for metric, (value, error) in result.metrics.items():
            about = (candidate.name, candidate.kind, bits, task, metric)
            scores.append(TaskScore(*about, value, error, result.examples, agreement))
    return scores
