"""Tokens a second of vLLM's own layers with the weights of containers, beside bf16.

    python -m benchmarks.serving.layers                  # an 8B-shaped Llama of 6 layers, on a GPU
    python -m benchmarks.serving.layers --device cpu     # small: a rehearsal

Run in an environment with vLLM. The layers are vLLM's, built and filled as the plug-in does in an
engine; what lies between them is torch's, and no scheduler runs. A token of 1, 16 and 64 sequences
is recorded in a CUDA graph. `error` is the largest difference between products of the first layer,
or of the head, and exact ones with the dense weights, over 2^-8 of the sum of |input * weight|.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import traceback
from pathlib import Path

import torch

from benchmarks.device import models
from benchmarks.device.batches import make_containers
from benchmarks.device.machine import Machine
from benchmarks.serving import stack as vllm_stack

BATCHES = (1, 16, 64)
CASES = (
    ("lossless", "dense"),
    ("lossless", "packed"),
    ("int8", "int8"),
    ("int8", "packed"),
    ("4.5 bits", "int8"),
    ("4.5 bits", "packed"),
)
_ROUNDING = 2.0**-8
_TOKENS, _TRIES = 30, 4


def main() -> None:
    """Makes the containers and prints a line for each residency as soon as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    machine = Machine(torch.device(options.device), small=options.device == "cpu")
    with tempfile.TemporaryDirectory(prefix="codecllm-layers-") as scratch:
        folder = Path(scratch)
        models.write_source(machine, folder / "source", options.layers)
        make_containers(folder, sorted({name for name, _ in CASES}))
        counts = "".join(f"{f'b{batch}':>10}" for batch in BATCHES)
        print(f"{'weights':20} load s    MiB  error | tokens/s:\n{'':43}|{counts}", flush=True)
        with vllm_stack.one_rank(), torch.inference_mode():
            for name, resident in CASES:
                _line(machine, folder / name, resident)


def _line(machine: Machine, folder: Path, resident: str) -> None:
    what = "bf16" if resident == "dense" else f"{folder.name}, {resident}"
    try:
        begin = time.perf_counter()
        stack = vllm_stack.build(folder, resident, machine.device)
        machine.synchronize()
        seconds = time.perf_counter() - begin
        memory = 0 if machine.rehearses else torch.cuda.memory_allocated() >> 20
        error = max(_errors(machine, folder, stack).values())
        print(f"{what:20} {seconds:6.1f} {memory:6} {error:6.2f} |", end="", flush=True)
        for batch in BATCHES:
            print(f" {batch / _seconds(machine, stack, batch):9.0f}", end="", flush=True)
        print(flush=True)
        del stack
    except Exception:  # the other residencies are still worth their lines
        print(f"\n{what:20} failed:\n{traceback.format_exc(limit=-6)}", flush=True)
    gc.collect()
    if not machine.rehearses:
        torch.cuda.empty_cache()


def _errors(machine: Machine, folder: Path, stack: vllm_stack.Stack) -> dict[str, float]:
    """Returns the error of each product, for one input and for several."""
    dense = vllm_stack.dense_weights(folder, machine.device)
    errors = {}
    for name, product in vllm_stack.products(stack):
        weight = dense[name].to(torch.float64)
        for batch in BATCHES:
            inputs = torch.randn(batch, weight.shape[1], device=machine.device).bfloat16()
            values = inputs.to(torch.float64)
            got = product(inputs)[:, : len(weight)].to(torch.float64)
            room = values.abs() @ weight.abs().T
            worst = ((got - values @ weight.T).abs() / room).max() / _ROUNDING
            errors[f"{name}, {batch}"] = float(worst)
    return errors


def _seconds(machine: Machine, stack: vllm_stack.Stack, batch: int) -> float:
    """Returns the seconds of a token of each of `batch` sequences."""
    token = torch.ones(batch, dtype=torch.int64, device=machine.device)
    caches = stack.caches(batch)

    def step() -> None:
        token.copy_(stack(token, caches))

    step()
    run = step if machine.rehearses else models.graphed(step)
    count = 1 if machine.rehearses else _TOKENS
    times = []
    for _ in range(_TRIES):
        machine.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        machine.synchronize()
        times.append((time.perf_counter() - begin) / count)
    return min(times)


if __name__ == "__main__":
    main()
