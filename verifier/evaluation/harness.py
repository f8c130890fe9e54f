"""All contact with lm-evaluation-harness (PyPI `lm-eval`): its tasks, run on a model in memory.

The package is an extra (`codecllm[eval]`) and is imported where a task is asked for. What it has no
public name for stands here alone: `lm_eval.tasks._yaml_loader.load_yaml`.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codecllm.formats.arguments.inputs import check_input
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError, one_line

SUFFIXES = (".yaml", ".yml")
_TASK_BYTES = 1 << 20
_BOOTSTRAP = 1000
"""Resamplings for the standard error of metrics that have no formula for it."""

Answer = int | bool | str
"""Number of a choice, whether a greedy continuation is the expected one, or a generated text."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task, run on one model.

    Attributes:
        metrics: name, with its filter where that is not `none` -> value and standard error, which
            is None where the harness gives none.
        answers: number of an example and filter -> the model's answer; none for metrics without
            one, as a perplexity.
        examples: how many were asked.
    """

    metrics: dict[str, tuple[float, float | None]]
    answers: dict[tuple[int, str], Answer]
    examples: int


class Harness:
    """Tasks that can be run on one model after another."""

    def __init__(self, tasks: Sequence[str]) -> None:
        """Finds tasks and reads their data.

        Args:
            tasks: names that the harness knows (tasks, groups, tags), or YAML files; relative paths
                in the `data_files` of a file are looked for beside it. A file is a program: it may
                name Python functions.

        Raises:
            UnsupportedEnvironmentError: the package is missing, or the data cannot be had.
            UsageError: there is no such task or file, or it cannot be read.
        """
        _check_package()
        files = [Path(task) for task in tasks if task.endswith(SUFFIXES)]
        for path in files:
            if not path.is_file():
                raise UsageError("no such task file", got=str(path))
        # Imports stay outside of `_quiet`: handlers of messages keep the stream of their making.
        from lm_eval.tasks import TaskManager

        with _quiet():
            # The index of thousands of tasks takes seconds, and files need none.
            self._manager = TaskManager(include_defaults=len(files) < len(tasks))
        specs: list[str | dict[str, Any]] = []
        for task in tasks:
            if task.endswith(SUFFIXES):
                specs.append(_read(Path(task)))
            elif task in self._manager.all_tasks:
                specs.append(task)
            else:
                raise UsageError("lm-evaluation-harness has no such task", got=repr(task))
        with _quiet():
            try:
                task_objects = self._manager.load(specs)["tasks"]
            except Exception as exc:  # YAML, Python code of tasks, data sets on disk or on the Hub
                raise UnsupportedEnvironmentError(
                    f"a task cannot be loaded ({type(exc).__name__}: {one_line(exc)})",
                    got=", ".join(tasks),
                ) from exc
        self._tasks = list(task_objects.values())

    def run(
        self, model: Any, tokenizer: Any, *, limit: int | None, batch_size: int
    ) -> dict[str, TaskResult]:
        """Runs the tasks on a model: task -> result.

        Args:
            model: causal language model of transformers, on its device.
            tokenizer: of transformers.
            limit: examples of each task at most.
            batch_size: sequences that the model reads at once.

        Raises:
            UnsupportedEnvironmentError: a task failed.
        """
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            try:
                found = simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=list(self._tasks),
                    task_manager=self._manager,
                    limit=limit,
                    bootstrap_iters=_BOOTSTRAP,
                )
            except Exception as exc:  # whatever the code of a task raises
                raise UnsupportedEnvironmentError(
                    f"a task failed ({type(exc).__name__}: {one_line(exc)})"
                ) from exc
        return {
            name: TaskResult(
                _metrics(found["results"][name]),
                _answers(found["samples"][name]),
                int(found["n-samples"][name]["effective"]),
            )
            for name in sorted(found["samples"])
        }


def _check_package() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as exc:
        raise UnsupportedEnvironmentError(
            "tasks need the package lm-eval: pip install 'codecllm[eval]'"
        ) from exc


def _read(path: Path) -> dict[str, Any]:
    """Returns a task file, whose data files are looked for beside it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    check_input(path, "the task file", _TASK_BYTES)
    try:
        config: dict[str, Any] = load_yaml(path)
    except Exception as exc:  # YAML's errors, or those of Python code that the file names
        raise UsageError(
            f"the task file cannot be read ({type(exc).__name__}: {one_line(exc)})", got=str(path)
        ) from exc
    if not isinstance(config.get("task"), str):
        raise UsageError("the task file has no name of one task (`task: NAME`)", got=str(path))
    options = config.get("dataset_kwargs") or {}
    if "data_files" in options:
        placed_files = _placed(options["data_files"], path.parent)
        config["dataset_kwargs"] = {**options, "data_files": placed_files}
    return config


def _placed(names: Any, folder: Path) -> Any:
    if isinstance(names, dict):
        return {split: _placed(value, folder) for split, value in names.items()}
    if isinstance(names, list):
        return [_placed(name, folder) for name in names]
    beside = folder / str(names)
    return str(beside.resolve()) if beside.is_file() else names


def _metrics(row: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Returns the figures of a task; the harness writes `acc,none` and `acc_stderr,none`."""
    figures = dict[str, tuple[float, float | None]]()
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else key
        figures[name] = float(value), float(error) if isinstance(error, int | float) else None
    return figures


def _answers(samples: list[dict[str, Any]]) -> dict[tuple[int, str], Answer]:
    pairs = ((sample, _answer(sample["filtered_resps"])) for sample in samples)
    return {
        (int(sample["doc_id"]), str(sample["filter"])): answer
        for sample, answer in pairs
        if answer is not None
    }


def _answer(responses: Sequence[Any]) -> Answer | None:
    """Returns what a model answered, from the responses to the requests of one example.

    A choice gives a log-likelihood and whether it is the greedy continuation; a question that is
    answered freely gives a text.
    """
    if len(responses) == 1 and isinstance(responses[0], str):
        return responses[0]
    if not responses or not all(
        isinstance(one, list | tuple) and len(one) == 2 for one in responses
    ):
        return None
    if len(responses) == 1:
        return bool(responses[0][1])
    return max(range(len(responses)), key=lambda number: float(responses[number][0]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress bars, prints and messages of the harness; its errors come as exceptions."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        logger.setLevel(level)
