"""Processor time of loading a model of many small tensors, beside transformers with the source.

`python -m benchmarks.others.many_tensors` makes a mixture of experts of 12,579 tensors (52 MB,
random), converts it and loads both by `AutoModelForCausalLM`, by turns in fresh processes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

_MAKE = """
import sys, torch, transformers
config = transformers.Qwen3MoeConfig(
    hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=32,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=128,
    num_experts_per_tok=8, vocab_size=512, max_position_embeddings=64)
torch.manual_seed(0)
transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
"""
_CONVERT = """
import sys, time
from codecllm.converter import convert
begin = time.process_time()
convert(sys.argv[1], sys.argv[2], scheme="lossless")
print(time.process_time() - begin)
"""
_LOAD = """
import sys, time
import codecllm.loader
from transformers import AutoModelForCausalLM
begin = time.process_time()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(time.process_time() - begin)
"""


def main(
    turns: Annotated[int, typer.Option(help="Loads of each.")] = 5,
) -> None:
    """Print the median processor times and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        source, container = str(Path(folder, "source")), str(Path(folder, "container"))
        _run(_MAKE, source)
        print(f"convert: {_run(_CONVERT, source, container):.2f} s")
        times: dict[str, list[float]] = {source: [], container: []}
        for _ in range(turns):
            for path, seconds in times.items():
                seconds.append(_run(_LOAD, path))
    plain, ours = (median(seconds) for seconds in times.values())
    print(f"load: source {plain:.2f} s, container {ours:.2f} s, ratio {ours / plain:.2f}")


def _run(code: str, *arguments: str) -> float:
    """Runs code in a fresh process; returns the number that it prints last, 0 without one."""
    command = [sys.executable, "-c", code, *arguments]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(lines[-1]) if lines else 0.0


if __name__ == "__main__":
    typer.run(main)
