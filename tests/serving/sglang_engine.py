"""SGLang in processes of their own: one that does not start ends the process that wants it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tests.serving.engine import IDS, ROOT

OPTIONS = {
    "attention_backend": "torch_native",
    "device": "cpu",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "grammar_backend": "none",
    "log_level": "warning",
    "max_running_requests": 4,
    "max_total_tokens": 512,
    "mem_fraction_static": 0.3,
    "sampling_backend": "pytorch",
    "skip_tokenizer_init": True,
}
"""Arguments of `sglang.Engine` for tests, on a CPU without SGLang's kernels."""


def why_not() -> str | None:
    """Returns why SGLang's tests cannot run here, or None."""
    if importlib.util.find_spec("sglang") is None:
        return "SGLang is not installed here: make test-sglang"
    groups = ("sglang.srt.plugins", "sglang.srt.platforms")
    names = {entry.name for group in groups for entry in entry_points(group=group)}
    missing = {"codecllm", "plain_cpu"} - names
    return f"{min(missing)} is not installed beside SGLang: make test-sglang" if missing else None


def variables(**more: str) -> dict[str, str]:
    """Returns the environment of a process that runs SGLang."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def serve_arguments(model: Path, port: int) -> list[str]:
    """Returns what Python gets to serve a model on loopback."""
    options = {**OPTIONS, "host": "127.0.0.1", "model_path": model, "port": port}
    del options["skip_tokenizer_init"]
    arguments = ["-m", "sglang.launch_server"]
    for name, value in options.items():
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments.append(str(value))
    return arguments


def run(arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with SGLang; what it says comes as one text."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=variables(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=500,
    )


def ask(
    folder: Path, models: Sequence[Path | str], prompts: list[Any] = IDS, **options: Any
) -> list[list[dict[str, Any]]]:
    """Continues prompts greedily; fails where the engine does not start.

    Args:
        folder: for the answers.
        models: folders, or names on the Hub; the first one is served, and the weights of each other
            one then take its place.
        prompts: `prompt_token_ids` of each.
        options: more arguments of `sglang.Engine`.

    Returns:
        For each model and prompt `ids`, and `logprobs` of the prompt.
    """
    done = start(folder, models, prompts, **options)
    assert done.returncode == 0, done.stdout[-4000:]
    return answers_in(folder)


def answers_in(folder: Path) -> list[list[dict[str, Any]]]:
    """Returns what an engine that has ended has left in `folder`; see `ask`."""
    answers: list[list[dict[str, Any]]] = json.loads((folder / "answers").read_text())
    return answers


def start(
    folder: Path,
    models: Sequence[Path | str],
    prompts: list[Any] = IDS,
    more: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Runs an engine as `ask` does, and returns its process."""
    job = {
        "options": {**OPTIONS, **options},
        "models": [str(model) for model in models],
        "prompts": [prompt["prompt_token_ids"] for prompt in prompts],
        "answers": str(folder / "answers"),
    }
    arguments = ["-m", "tests.serving.sglang_child", json.dumps(job)]
    return run(arguments, **(more or {}))
