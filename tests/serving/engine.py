"""vLLM in a process of its own: its warnings, its threads and its settings stay there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "Water boils at"]
IDS = [{"prompt_token_ids": list(range(first, first + 20))} for first in (5, 77, 200)]
"""Prompts for tiny models, which have no tokenizer."""

PICTURES = [{"prompt": "w5 <image> w7 w8", "image_size": 32}, {"prompt": "w9 w10 w11"}]
"""Prompts for `served_models.make("idefics3")`, with a picture and without."""

ONE_PROCESS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Variables for an engine inside of the process, with a cache for keys and values of 1 GiB."""

TWO_RANKS = {
    **ONE_PROCESS,
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Variables for tensor parallelism on two cores."""

OPTIONS = {
    "disable_log_stats": True,
    "distributed_executor_backend": "uni",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.3,
    "max_model_len": 256,
}
"""Arguments of `LLM` for tests; the share of memory is of the machine's, on a CPU too."""

TINY = {"max_model_len": 48, "skip_tokenizer_init": True}

TINY_MODELS = [
    ("llama_alias", "mixed"),
    ("phi3", "all_int8"),
    ("qwen2", "mixed"),
    ("qwen3_moe", "all_int8"),
]
"""Models and schemes, a start of vLLM each: see `served_models` and `conftest.SCHEMES`."""


def why_not() -> str | None:
    """Returns why vLLM's tests cannot run here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here: make test-vllm"
    names = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    return None if "codecllm" in names else "codecllm is not installed beside vLLM: make test-vllm"


def variables(folder: Path, base: dict[str, str], **more: str) -> dict[str, str]:
    """Returns the environment of a process that runs vLLM, its caches in `folder`."""
    unset = ("TRITON_INTERPRET", "HIP_VISIBLE_DEVICES")
    own = {name: value for name, value in os.environ.items() if name not in unset}
    path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])
    places = {"PATH": path, "PYTHONPATH": str(ROOT), "VLLM_CACHE_ROOT": str(folder / "cache")}
    return {**own, **base, **places, **more}


class Engine:
    """A process with vLLM."""

    def __init__(self, folder: Path, base: dict[str, str], **more: str) -> None:
        """Starts the process, its log in `folder`, with the environment `variables`."""
        self.log = folder / "log"
        reading, writing = os.pipe()
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.serving.child", str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=variables(folder, base, **more),
                pass_fds=[writing],
                text=True,
            )
        os.close(writing)
        self._answers = os.fdopen(reading)
        self._known: dict[str, Any] = {}

    def ask(
        self,
        model: Path | str,
        prompts: list[Any] = PROMPTS,
        tokens: int = 16,
        adapter: Path | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Loads a model and continues prompts greedily.

        Args:
            model: its folder, or its name on the Hub.
            prompts: texts, some with a picture, or for a model without a tokenizer lists of ids.
            tokens: new tokens of each.
            adapter: folder of a LoRA adapter to run with.
            options: more arguments of `LLM`.

        Returns:
            `outputs` (text, ids, log-probabilities of the prompt), `hash` (the key of the compile
            cache) and `dtypes`, or `error` and `message`.
        """
        has_text = isinstance(prompts[0], str) or "prompt" in prompts[0]
        tiny = {} if has_text else TINY
        merged = {**OPTIONS, **tiny, **options, "model": str(model)}
        path = None if adapter is None else str(adapter)
        job = {"options": merged, "prompts": prompts, "tokens": tokens, "adapter": path}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._answers.readline()
        assert answer, f"vLLM's process ended:\n{self.log.read_text()[-3000:]}"
        loaded: dict[str, Any] = json.loads(answer)
        return loaded

    def outputs(self, model: Path | str, prompts: list[Any] = PROMPTS, **options: Any) -> Any:
        """Returns the `outputs` of `ask`; fails where there are none. Asks once for each model."""
        key = json.dumps([str(model), prompts, options], sort_keys=True)
        if key not in self._known:
            answer = self.ask(model, prompts, **options)
            assert "outputs" in answer, (answer, self.log.read_text()[-3000:])
            self._known[key] = answer["outputs"]
        return self._known[key]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


@contextmanager
def running(folder: Path, base: dict[str, str] = ONE_PROCESS, **more: str) -> Iterator[Engine]:
    """Yields an engine whose process ends with the block."""
    engine = Engine(folder, base, **more)
    try:
        yield engine
    finally:
        engine.close()


def distance(one: Any, other: Any) -> float:
    """Returns the largest difference between log-probabilities of two outputs' prompts."""
    return max(
        abs(first[token] - second[token])
        for left, right in zip(one, other, strict=True)
        for first, second in zip(left["logprobs"], right["logprobs"], strict=True)
        for token in first.keys() & second.keys()
    )
