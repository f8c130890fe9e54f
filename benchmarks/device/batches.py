"""Times tokens of a whole model on a GPU, for each residency and several batches.

    python -m benchmarks.device.batches              # an 8B-shaped Llama of 6 layers, two minutes
    python -m benchmarks.device.batches --experts    # Qwen3-MoE: 128 experts, 8 of them routed

Weights are random. A line has the seconds of a load (files in the page cache), memory after it,
milliseconds of a token for 1, 16 and 64 sequences, in a CUDA graph and launch by launch (eager),
and those of a prompt of 2,048 tokens. `without products` is the same model with linear layers that
compute nothing: no residency can be faster.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.device import models
from benchmarks.device.machine import Machine

BATCHES = (1, 16, 64)
PROMPT = 2048
CONTAINERS = {
    "lossless": ("--scheme", "lossless"),
    "int8": ("--scheme", "int8"),
    "4.5 bits": ("--bits", "4.5", "--calibrate", "none"),
    "3 bits": ("--bits", "3", "--calibrate", "none"),
    "lossless, 32 KiB": ("--scheme", "lossless", "--chunk-kib", "32"),
    "int8, 32 KiB": ("--scheme", "int8", "--chunk-kib", "32"),
}
CASES = (
    ("lossless", "dense"),
    ("lossless", "packed"),
    ("int8", "int8"),
    ("int8", "packed"),
    ("4.5 bits", "packed"),
    ("lossless, 32 KiB", "compressed"),
    ("int8, 32 KiB", "compressed"),
)
EXPERTS = (
    ("int8", "dense"),
    ("int8", "int8"),
    ("int8", "packed"),
    ("4.5 bits", "packed"),
    ("3 bits", "packed"),
)
_MACHINE = Machine(torch.device("cuda"), small=False)


def selected(cases: Sequence[tuple[str, str]], only: Sequence[str] | None) -> list[tuple[str, str]]:
    """Returns the cases that `only` names as "container, residency"; all of them without it."""
    return [case for case in cases if not only or ", ".join(case) in only]


def moe_source(folder: Path) -> None:
    """Writes a Qwen3-MoE of 4 layers with the widths of Qwen3-30B-A3B."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=32_000,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def make_containers(folder: Path, names: list[str]) -> None:
    """Converts folder/source into folder/NAME, all at once, each in a process of its own."""
    command = [sys.executable, "-m", "codecllm", "convert", str(folder / "source")]
    options = ["--codec", "rans", "--no-baseline", "--quiet"]
    processes = {
        name: subprocess.Popen(
            [*command, str(folder / name), *options, *CONTAINERS[name]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in names
    }
    for name, process in processes.items():
        text, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{name}: {text}")


def _milliseconds(run: Callable[[], object], count: int, tries: int = 4) -> float:
    times = []
    for _ in range(tries):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count * 1e3)
    return min(times)


@torch.inference_mode()
def measure(model: Any, *, graphs_only: bool = False) -> tuple[str, list[int]]:
    """Returns the columns of a line, and the first greedy tokens."""
    columns, tokens = [], []
    for batch in BATCHES:
        step, token = models.token_step(model, batch)
        for _ in range(4):
            step()
            if batch == 1:
                tokens.append(int(token[0, 0]))
        eager = 0.0 if graphs_only else _milliseconds(step, 20)
        try:
            graph = models.graphed(step)
            in_graph = f"{_milliseconds(graph, 20):7.3f}"
        except Exception as exc:  # a library's own layers may refuse to be recorded
            in_graph = f" cannot ({type(exc).__name__})"
            torch.cuda.synchronize()
        columns.append(f"{in_graph} {eager:7.2f}")
    # Not random: after a failed capture the generator of the device is still part of the graph.
    prompt = torch.arange(PROMPT, device="cuda")[None] % 1000
    prefill = partial(model, input_ids=prompt, use_cache=False, logits_to_keep=1)
    prefill()
    columns.append(f"{_milliseconds(prefill, 5):8.2f}")
    return " |".join(columns), tokens


@contextmanager
def _without_products() -> Iterator[None]:
    real = functional.linear
    functional.linear = lambda inputs, weight, bias=None: inputs.new_empty(
        *inputs.shape[:-1], weight.shape[0]
    )
    try:
        yield
    finally:
        functional.linear = real


def _line(name: str, load: Callable[[], Any], **options: bool) -> list[int]:
    """Loads twice, prints a line of the table, and returns the first greedy tokens."""
    seconds = []
    model = None
    for _ in range(2):
        model = None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        start = time.perf_counter()
        model = load()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.memory_allocated() >> 20
    columns, tokens = measure(model, **options)
    print(f"{name:28} {min(seconds):6.2f} {memory:6} |{columns}  {tokens}", flush=True)
    return tokens


def main() -> None:
    """Makes the containers and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", action="store_true", help="a mixture of experts instead")
    parser.add_argument("--only", action="append", help='such as "int8, packed"; may be repeated')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="codecllm-batches-") as scratch:
        folder = Path(scratch)
        if options.experts:
            moe_source(folder / "source")
        else:
            models.write_source(_MACHINE, folder / "source", options.layers)
        torch.cuda.empty_cache()
        cases = selected(EXPERTS if options.experts else CASES, options.only)
        make_containers(folder, sorted({name for name, _ in cases}))
        head = " |".join(f"{f'b{batch} graph':>10} eager" for batch in BATCHES)
        print(f"{'residency':28} load s    MiB |{head} | prefill  first tokens", flush=True)
        plain = partial(models.load_source, _MACHINE, folder / "source")
        with _without_products():
            _line("without products", plain, graphs_only=True)
        _line("bf16", plain)
        for name, resident in cases:
            load = partial(models.load_container, _MACHINE, folder / name, resident)
            _line(f"{name}, {resident}", load)


if __name__ == "__main__":
    main()
