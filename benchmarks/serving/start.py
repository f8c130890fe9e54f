"""One start of vLLM in a process of its own: `python -m benchmarks.serving.start MODEL RESIDENT`.

Prints JSON. The engine runs inside of the process, so that its memory is this process's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Read by vLLM when it is imported. Keys and values get 1 GiB, its smallest amount."""

PROMPT = "The capital of France is"
TOKENS = 64


def measure(model: str, resident: str) -> dict[str, float]:
    """Starts vLLM on a model and continues a prompt; times are from behind vLLM's import.

    Args:
        model: folder.
        resident: `plain` for a model that is no container, else a value of our option.
    """
    from vllm import LLM, SamplingParams

    from benchmarks.measure.memory import PeakMemory, anonymous_mib

    options: dict[str, Any] = {
        "disable_log_stats": True,
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        "max_model_len": 512,
        "use_tqdm_on_load": False,
    }
    if resident != "plain":
        options["model_loader_extra_config"] = {"resident": resident}
    before = anonymous_mib()
    begin, busy = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        engine = LLM(model, **options)
    started = time.perf_counter()
    greedy = SamplingParams(temperature=0, max_tokens=1)
    engine.generate([PROMPT], greedy, use_tqdm=False)
    first, busy = time.perf_counter(), time.process_time() - busy
    held = anonymous_mib() - before
    greedy.max_tokens, greedy.ignore_eos = TOKENS, True
    again = time.perf_counter()
    engine.generate([PROMPT], greedy, use_tqdm=False)
    end = time.perf_counter()
    return {
        "start_s": started - begin,
        "first_token_s": first - begin,
        "first_token_cpu_s": busy,
        "tokens_per_s": TOKENS / (end - again),
        "peak_mib": peak.mib,
        "held_mib": held,
    }


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    print(json.dumps(measure(*sys.argv[1:])))
