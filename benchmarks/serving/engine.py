"""Tokens a second of vLLM on a GPU with the weights of containers, beside bf16.

    python -m benchmarks.serving.engine              # a Llama of 32 layers of 8B's shapes
    python -m benchmarks.serving.engine --experts    # Qwen3-MoE: 128 experts, 8 of them routed

Run in an environment with vLLM. Weights are random, the vocabulary has 16,032 words. Each model has
an engine in a process of its own, which is measured alone: 1, 16 and 64 prompts of 32 tokens are
continued by 128 greedy ones. A figure is the best of three differences between that and one token.
Tokens of a decoding step are in CUDA graphs; `--compile` lets vLLM compile the model too. `GPU ms`
is the time of all kernels of a step, at 1 and at 64 prompts: with few layers the engine is bound by
its own work on the host, which differs between processes more than weights do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device import batches, models
from benchmarks.device.machine import Machine

BATCHES = (1, 16, 64)
PROMPT, NEW = 32, 128
_PROFILED = 32
PLAIN = ("source", "plain")
CASES = (
    ("lossless", "packed"),
    ("int8", "int8"),
    ("int8", "packed"),
    ("4.5 bits", "packed"),
)
EXPERTS = (("int8", "dense"), ("int8", "int8"))
_TRIES = 3
_LIMIT_S = 180
"""Seconds that an engine may take."""

_SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    """Makes the models and prints a line for each as soon as it is measured."""
    options = _options()
    if options.child:
        print(json.dumps(_measure(sys.stdin.readline().strip(), options)))
        return
    ours = batches.selected(EXPERTS if options.experts else CASES, options.only)
    cases = [PLAIN, *ours]
    # Their imports take as long as the models.
    engines = [_start(resident) for _, resident in cases]
    with tempfile.TemporaryDirectory(prefix="codecllm-engine-") as scratch:
        folder = Path(scratch)
        if options.experts:
            batches.moe_source(folder / "source")
        else:
            machine = Machine(torch.device("cuda"), small=False)
            models.write_source(machine, folder / "source", options.layers)
        torch.cuda.empty_cache()
        batches.make_containers(folder, sorted({name for name, _ in cases} - {"source"}))
        counts = "".join(f"{f'b{batch}':>9}" for batch in BATCHES)
        head = (
            f"{'weights':20} start s    MiB | tokens/s:{counts} | GPU ms: b1   b64 | first tokens"
        )
        print(head, flush=True)
        for (name, resident), engine in zip(cases, engines, strict=True):
            what = "bf16" if resident == "plain" else f"{name}, {resident}"
            print(f"{what:20} {_line(engine, folder / name)}", flush=True)


def _options() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", action="store_true", help="a mixture of experts instead")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    parser.add_argument("--attention", help="vLLM's attention backend instead of its choice")
    parser.add_argument("--only", action="append", help='such as "int8, packed"; may be repeated')
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _start(resident: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.serving.engine", *sys.argv[1:]]
    return subprocess.Popen(
        [*command, "--child", resident],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **_SETTINGS},
        text=True,
    )


def _line(engine: subprocess.Popen[str], folder: Path) -> str:
    """Lets an engine measure a model; returns its line, or how it failed."""
    try:
        out, errors = engine.communicate(f"{folder}\n", timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        engine.kill()
        out, errors = engine.communicate()
    if engine.returncode:
        return f"failed ({engine.returncode}):\n{(out + errors)[-2500:]}"
    found = json.loads(out.splitlines()[-1])
    rates = "".join(f"{rate:9.0f}" for rate in found["rates"])
    kernels = "".join(f"{ms:7.3f}" for ms in found["gpu_ms"])
    start = f"{found['start_s']:7.1f} {found['mib']:6.0f}"
    return f"{start} | {'':9}{rates} | {kernels} | {found['tokens']}"


def _measure(folder: str, options: Any) -> dict[str, Any]:
    """Starts vLLM on a model and measures it."""
    from vllm import LLM, SamplingParams

    compiling = {} if options.compile else {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    chosen: dict[str, Any] = {
        "compilation_config": {"cudagraph_capture_sizes": list(BATCHES), **compiling}
    }
    if options.attention:
        chosen["attention_config"] = {"backend": options.attention}
    if options.child != "plain":
        chosen["model_loader_extra_config"] = {"resident": options.child}
    begin = time.perf_counter()
    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        kv_cache_memory_bytes=8 << 30,
        disable_log_stats=True,
        **chosen,
    )
    started = time.perf_counter() - begin

    def generate(batch: int, count: int) -> tuple[float, Any]:
        wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [(7 * i + 13 * j) % 500 + 3 for j in range(PROMPT)]}
            for i in range(batch)
        ]
        begin = time.perf_counter()
        outputs = engine.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - begin, outputs

    rates = []
    for batch in BATCHES:
        generate(batch, 2)
        seconds = min(generate(batch, NEW)[0] - generate(batch, 1)[0] for _ in range(_TRIES))
        rates.append(batch * (NEW - 1) / seconds)
    gpu_ms = []
    for batch in (BATCHES[0], BATCHES[-1]):
        one, more = (_kernel_ms(partial(generate, batch, 1 + count)) for count in (0, _PROFILED))
        gpu_ms.append((more - one) / _PROFILED)
    tokens = list(generate(1, 4)[1][0].outputs[0].token_ids)
    mib = sum(engine.apply_model(_held)) / 2**20
    return {"start_s": started, "mib": mib, "rates": rates, "gpu_ms": gpu_ms, "tokens": tokens}


def _kernel_ms(run: Callable[[], object]) -> float:
    """Returns the milliseconds of all kernels of a call."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in trace.key_averages()) / 1e3


def _held(model: torch.nn.Module) -> int:
    """Returns the bytes of the memory that was allocated for a model and its cache, less the cache.

    vLLM's cache has 8 GiB here.
    """
    del model
    return torch.cuda.memory_allocated() - (8 << 30)


if __name__ == "__main__":
    main()
