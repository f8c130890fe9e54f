"""One measured model, in a process of its own: `python -m codecllm.bench.run JSON`.

Its last line on stdout is a JSON object.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

RUNS = 3


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Loads a model, generates, and returns the figures of a `bench.Row`.

    Args:
        job: `path`, `is_source`, `resident`, `device`, `prompt_tokens`, `new_tokens`, `batch`,
            `threads` (None: torch's own choice).
    """
    import torch
    from transformers import GenerationConfig

    from codecllm.loader import from_pretrained
    from codecllm.loader.hf.plain import load_plain
    from codecllm.loader.hf.quiet import without_progress_bars

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    on_gpu = job["device"] != "cpu"
    before = _peak_bytes(on_gpu)
    began = time.perf_counter()
    with without_progress_bars():
        if job["is_source"]:
            model = load_plain(Path(job["path"])).to(job["device"])
        else:
            model = from_pretrained(
                job["path"],
                resident=job["resident"],
                device_map=job["device"] if on_gpu else None,
                progress=False,
            )
    load_seconds = time.perf_counter() - began
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return {"error": f"{type(model).__name__} does not generate text"}
    gc.collect()
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (job["batch"], job["prompt_tokens"])
    ids = torch.randint(vocabulary, shape, generator=generator).to(model.device)

    def seconds(tokens: int) -> tuple[float, list[int]]:
        plain = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            decoder_start_token_id=model.generation_config.decoder_start_token_id,
        )
        model.generation_config = plain
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
        last: list[int] = out[0, -tokens:].tolist()  # the copy waits for the device
        return time.perf_counter() - start, last

    seconds(2)  # kernels are chosen, and memory is allocated, at the first use
    first = statistics.median(seconds(1)[0] for _ in range(RUNS))
    runs = [seconds(job["new_tokens"]) for _ in range(RUNS)]
    whole = statistics.median(run[0] for run in runs)
    return {
        "load_seconds": load_seconds,
        "weights_bytes": int(model.get_memory_footprint(return_buffers=False)),
        "peak_bytes": _peak_bytes(on_gpu) - before,
        "first_token_seconds": first,
        "tokens_per_second": job["batch"] * (job["new_tokens"] - 1) / max(whole - first, 1e-9),
        "tokens": runs[0][1],
    }


def _peak_bytes(on_gpu: bool) -> int:
    """Returns the most memory that this process has had: of the GPU, or of the machine."""
    if on_gpu:
        import torch

        return int(torch.cuda.max_memory_allocated())
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        # No /proc outside Linux.
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Measures the job of the command line and prints the figures."""
    from codecllm.formats.errors import CodecLLMError

    try:
        figures = measure(json.loads(sys.argv[1]))
    except CodecLLMError as exc:
        figures = {"error": str(exc)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
