"""One measured task in a process of its own: `python -m benchmarks.peak WORK ...` prints JSON.

Imports come first and are not counted; memory is RssAnon above its value after the imports.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure.memory import PeakMemory

_WARM_BYTES = 1 << 30
"""Memory that is taken and freed just before each timed load."""


def in_fresh_process(work: str, *arguments: object) -> dict[str, float]:
    """Runs a piece of work in a new process and returns its figures."""
    command = [sys.executable, "-m", "benchmarks.peak", work, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{process.stderr}")
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
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
    with PeakMemory() as peak, Container(container) as opened_container:
        for _, tensor in stream_tensors(opened_container, workers=int(workers)):
            largest = max(largest, tensor.nbytes)
    return {"mib": peak.mib, "largest_mib": largest / 2**20}


def load(container: str, resident: str, workers: str, warm: bool = True) -> dict[str, float]:
    """Time of `from_pretrained`; see `_start` for `warm`."""
    _import_model_class(container)
    from codecllm.loader import from_pretrained

    start = _start(warm)
    from_pretrained(
        container,
        resident=resident,  # type: ignore[arg-type]
        workers=int(workers),
        progress=False,
    )
    return {"seconds": time.perf_counter() - start}


def load_cold(container: str, resident: str, workers: str) -> dict[str, float]:
    """As `load`, in free memory as the machine has it."""
    return load(container, resident, workers, warm=False)


def load_peak(container: str, resident: str, workers: str) -> dict[str, float]:
    """Peak memory of `from_pretrained`, over the imports and over the model itself."""
    _import_model_class(container)
    from codecllm.loader import from_pretrained

    with PeakMemory() as peak:
        model = from_pretrained(
            container,
            resident=resident,  # type: ignore[arg-type]
            workers=int(workers),
            progress=False,
        )
    return {"mib": peak.mib - _model_mib(model), "model_mib": _model_mib(model)}


def load_plain(source: str) -> dict[str, float]:
    """Time of plain `from_pretrained` with every page of every weight touched: it maps the file."""
    _import_model_class(source)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    start = _start()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    mapped_seconds = time.perf_counter() - start
    _touch(model)
    return {"seconds": time.perf_counter() - start, "seconds_mapped_only": mapped_seconds}


def load_floor(container: str, workers: str) -> dict[str, float]:
    """Time of the bare decoding loop over all chunks of a container, into memory of its own."""
    from benchmarks.measure import floors

    _start()
    return {"seconds": floors.load_floor(Path(container), int(workers))}


def load_peer(name: str, source: str, folder: str) -> dict[str, float]:
    """Time of another tool's state dict, then of the model that transformers makes of it."""
    _import_model_class(source)
    import transformers
    from transformers.utils import logging

    from benchmarks.others import peers

    logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(source)
    cls = getattr(
        transformers, config.architectures[0]
    )  # not built here: that would warm its memory up
    start = _start()
    state = peers.LOADERS[name](Path(folder))
    decoding_seconds = time.perf_counter() - start
    model = cls.from_pretrained(None, config=config, state_dict=state, dtype="auto")
    _touch(model)
    return {"seconds": time.perf_counter() - start, "seconds_decoding": decoding_seconds}


def generate(container: str, resident: str, workers: str) -> dict[str, float]:
    """Seconds per token of greedy decoding; peak memory over imports until the last token."""
    _import_model_class(container)
    import torch

    from codecllm.loader import from_pretrained
    from codecllm.loader.resident import compressed_form

    decoding = _TimedDecoding(compressed_form.CompressedTensor)
    with PeakMemory() as peak:
        model = from_pretrained(
            container,
            resident=resident,  # type: ignore[arg-type]
            workers=int(workers),
            progress=False,
        )
        prompt = {
            "input_ids": torch.arange(100, 116)[None],
            "attention_mask": torch.ones(1, 16, dtype=torch.int64),
        }
        tokens = 4 if resident == "compressed" else 32
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        with torch.inference_mode():
            model.generate(**prompt, **options)
            decoding.seconds = 0.0
            start = time.perf_counter()
            model.generate(**prompt, **options)
            seconds = time.perf_counter() - start
    return {
        "seconds_per_token": seconds / tokens,
        "mib": peak.mib,
        "decoding_share": decoding.seconds / seconds,
    }


class _TimedDecoding:
    """Adds up the seconds that a class spends in `decode_bands`, from now on."""

    def __init__(self, cls: Any) -> None:
        self.seconds = 0.0
        plain = cls.decode_bands

        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            plain(*arguments)
            self.seconds += time.perf_counter() - start

        cls.decode_bands = timed


def _touch(model: Any) -> None:
    """Reads one byte of every page of every parameter."""
    import torch

    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8).numpy()[::4096].sum()


def _model_mib(model: Any) -> float:
    """Returns the bytes of a model's tensors, coded or not, in MiB."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return float(sum(sizes.values())) / 2**20


def _start(warm: bool = True) -> float:
    """Returns the time, after work that would fall into some measurements only.

    That is a collection of the imports' garbage and, where `warm`, the supply of free memory: the
    host of a virtual machine takes back memory that was free for seconds, and needs up to a second
    to give 300 MB again.
    """
    gc.collect()
    if warm:
        import numpy as np

        np.ones(_WARM_BYTES, np.uint8)
    return time.perf_counter()


def _import_model_class(folder: str) -> None:
    """Imports the modules of a load, so that neither time nor memory of it is counted."""
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text())
    getattr(transformers, config["architectures"][0])


WORKS: dict[str, Callable[..., dict[str, float]]] = {
    "convert": convert,
    "stream": stream,
    "load": load,
    "load_cold": load_cold,
    "load_peak": load_peak,
    "load_plain": load_plain,
    "load_floor": load_floor,
    "load_peer": load_peer,
    "generate": generate,
}

if __name__ == "__main__":
    print(json.dumps(WORKS[sys.argv[1]](*sys.argv[2:])))
