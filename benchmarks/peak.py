"""One measured piece of work in a process of its own: `python -m benchmarks.peak WORK ...` prints figures as JSON.

Imports come first and are not counted; memory is RssAnon above what the process held after them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.memory import PeakMemory, anonymous_mib


def in_fresh_process(work: str, *arguments: object) -> dict[str, float]:
    """Runs a piece of work in a new process and returns its figures."""
    command = [sys.executable, "-m", "benchmarks.peak", work, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def convert(source: str, out: str, workers: str) -> dict[str, float]:
    """Peak memory of a conversion."""
    from codecllm.converter import convert as run

    with PeakMemory() as peak:
        run(source, out, workers=int(workers), force=True)
    return {"mib": peak.mib}


def stream(container: str, workers: str) -> dict[str, float]:
    """Peak memory of streaming all tensors and dropping each at once."""
    from codecllm.formats.container import Container
    from codecllm.loader import stream_tensors

    largest = 0
    with PeakMemory() as peak, Container(container) as opened:
        for _, tensor in stream_tensors(opened, workers=int(workers)):
            largest = max(largest, tensor.nbytes)
    return {"mib": peak.mib, "largest_mib": largest / 2**20}


def load(container: str, resident: str, workers: str) -> dict[str, float]:
    """Time and peak memory of `from_pretrained`, over the imports and over the model itself."""
    _import_model_class(container)
    from codecllm.loader import from_pretrained

    started = time.perf_counter()
    with PeakMemory() as peak:
        model = from_pretrained(container, resident="int8" if resident == "int8" else "dense", workers=int(workers))
    seconds = time.perf_counter() - started
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    model_mib = sum(tensors.values()) / 2**20
    return {"seconds": seconds, "mib": peak.mib - model_mib, "model_mib": model_mib}


def load_plain(source: str) -> dict[str, float]:
    """Time of plain transformers `from_pretrained`, every weight touched once (it maps the file and reads nothing)."""
    _import_model_class(source)
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    mapped = time.perf_counter() - started
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1).view(torch.int16).max()
    return {"seconds": time.perf_counter() - started, "seconds_mapped_only": mapped, "anonymous_mib": anonymous_mib()}


def _import_model_class(folder: str) -> None:
    """Imports what loading will import, so that neither time nor memory of it is counted."""
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text())
    getattr(transformers, config["architectures"][0])


WORKS: dict[str, Callable[..., dict[str, float]]] = {
    "convert": convert,
    "stream": stream,
    "load": load,
    "load_plain": load_plain,
}

if __name__ == "__main__":
    print(json.dumps(WORKS[sys.argv[1]](*sys.argv[2:])))
