"""Times a conversion to a rate on a device, stage by stage, on a random Llama of the 8B shape.

    python -m benchmarks.device.convert --layers 32 --bits 4 --refine --device cuda
    python -m benchmarks.device.convert --check --device cuda

The table has seconds and peak memory of each stage: of the host RssAnon above its value at the
start (imports, and CUDA's context where the device is one, come before), of the device what torch
has allocated. Below it stands the peak of the whole process: its resident memory, pages of mapped
files and CUDA's context among it, and what torch has reserved of the device. `--check` converts a
small model on the CPU and twice on the device instead: both rates have to be within 0.02 bit, both
divergences from the source within a tenth, and both runs on the device equal byte for byte. The
model has a tokenizer, so it is calibrated on the text of the package; with `--calibrate self` it
writes the text itself, which takes longer.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import llama
from benchmarks.device.random_llama import write_model
from benchmarks.measure.memory import anonymous_mib
from codecllm import api
from codecllm.formats.errors import BaselineError
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.places import device_of
from codecllm.quality import DEFAULT_CALIBRATION
from codecllm.verifier import record_baseline

FULL = llama.FULL | {"vocab_size": 128256}
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
STAGES = {
    "calibrating: the model writes": "text",
    "calibrating: gradients": "gradients",
    "calibrating: pairs": "pairs of inputs",
    "choosing steps": "steps",
    "refining": "steps, refined",
    "baseline: running the source": "baseline, source",
    "baseline: running the converted": "baseline, container",
}
"""Beginnings of the sentences that a conversion tells -> stages."""

SAME_BITS, SAME_KL = 0.02, 0.1
_INTERVAL_S = 0.02


@dataclass(slots=True)
class Stage:
    """One stage.

    Attributes:
        name: of it.
        seconds: that it took.
        host_mib: highest RssAnon in it, above that of the start.
        device_mib: highest memory that torch had allocated on the device.
    """

    name: str
    seconds: float = 0.0
    host_mib: float = 0.0
    device_mib: float = 0.0


class Meter:
    """Measures stages, one after another, from the sentences of a conversion."""

    def __init__(self, device: torch.device) -> None:
        """Begins with the stage `load`."""
        self.stages: list[Stage] = []
        self.reserved_mib = 0.0
        self._device = device
        self._base = anonymous_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._begin("load")
        self._thread.start()

    def tell(self, sentence: str) -> None:
        """Takes a sentence: a new stage, unless it is the progress of this one."""
        for beginning, name in STAGES.items():
            if sentence.startswith(beginning) and self.stages[-1].name != name:
                self._begin(name)

    def progress(self, name: str, done: int, total: int) -> None:
        """Takes the progress of writing, which is a stage too."""
        if self.stages[-1].name != "encode and write" and done < total:
            self._begin("encode and write")

    def finish(self) -> list[Stage]:
        """Ends the last stage and returns all."""
        self._end()
        self._done.set()
        self._thread.join()
        return self.stages

    def _begin(self, name: str) -> None:
        if self.stages:
            self._end()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.stages.append(Stage(name))
        self._began = time.perf_counter()
        print(f"... {name}", file=sys.stderr, flush=True)

    def _end(self) -> None:
        stage = self.stages[-1]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            stage.device_mib = torch.cuda.max_memory_allocated(self._device) / 2**20
            reserved = torch.cuda.max_memory_reserved(self._device) / 2**20
            self.reserved_mib = max(self.reserved_mib, reserved)
        stage.seconds = time.perf_counter() - self._began
        print(f"    {stage.seconds:.1f} s", file=sys.stderr, flush=True)

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            stage = self.stages[-1]
            stage.host_mib = max(stage.host_mib, anonymous_mib() - self._base)


def measure(source: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Converts a model and returns the figures."""
    device = device_of(options.device)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context is no part of the first stage
    meter = Meter(device)
    began = time.perf_counter()
    converted = api.convert(
        source,
        out,
        bits=options.bits,
        calibrate=options.calibrate,
        refine=options.refine,
        codec=options.codec,
        workers=options.workers,
        device=options.device,
        baseline=False,
        progress=meter.progress,
        on_stage=meter.tell,
        force=True,
    )
    baseline = _baseline(source, out, str(device), meter) if options.baseline else None
    seconds = time.perf_counter() - began
    stages = [asdict(stage) for stage in meter.finish()]
    return {
        "device": str(device),
        "bits": converted.report.quantized_bits_per_weight,
        "seconds": seconds,
        "stages": stages,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "reserved_mib": meter.reserved_mib,
        "warnings": converted.report.warnings,
        "baseline": baseline,
    }


def _baseline(source: Path, out: Path, device: str, meter: Meter) -> dict[str, Any]:
    """Records the baseline; random weights may predict too little to pass its floor."""
    try:
        outcome = record_baseline(out, source, required=True, device=device, on_stage=meter.tell)
    except BaselineError as exc:
        return {"error": str(exc)}
    return outcome.to_dict()


def table(run: dict[str, Any]) -> str:
    """Returns the figures of a run as a Markdown table."""
    lines = ["| stage | seconds | host, MiB | device, MiB |", "|---|---:|---:|---:|"]
    whole = {
        "name": "**all**",
        "seconds": run["seconds"],
        "host_mib": max(stage["host_mib"] for stage in run["stages"]),
        "device_mib": max(stage["device_mib"] for stage in run["stages"]),
    }
    for stage in (*run["stages"], whole):
        lines.append(
            f"| {stage['name']} | {stage['seconds']:.1f} | {stage['host_mib']:,.0f} "
            f"| {stage['device_mib']:,.0f} |"
        )
    peak = (
        f"peak of the process: {run['resident_mib']:,.0f} MiB resident, "
        f"{run['reserved_mib']:,.0f} MiB reserved on the device"
    )
    return "\n".join([f"{run['device']}: {run['bits']:.4f} bits a weight", "", *lines, "", peak])


def check(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Converts a small model on the CPU and twice on the device, and compares."""
    source = folder / "source"
    write_model(source, SMALL, 4, torch.device("cpu"))
    names = {"cpu": "cpu", "device": options.device, "again": options.device}
    runs = {}
    for name, device in names.items():
        wanted = argparse.Namespace(**{**vars(options), "device": device})
        runs[name] = measure(source, folder / name, wanted)
        print(table(runs[name]), "\n", flush=True)
    divergences = {name: _divergence(source, folder / name) for name in ("cpu", "device")}
    written = [
        {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        for name in ("device", "again")
    ]
    return {
        "bits": {name: run["bits"] for name, run in runs.items()},
        "kl": divergences,
        "same rate": abs(runs["cpu"]["bits"] - runs["device"]["bits"]) <= SAME_BITS,
        "same divergence": abs(divergences["device"] / divergences["cpu"] - 1) <= SAME_KL,
        "same bytes at every run": written[0] == written[1],
        "runs": runs,
    }


def _divergence(source: Path, container: Path) -> float:
    """Returns the mean KL divergence of a container's predictions from the source's, in nats."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(SMALL["vocab_size"], (16, 64), generator=generator)
    models = load_plain(source, torch.float32), from_pretrained(container, dtype=torch.float32)
    with torch.no_grad():
        expected, got = (
            torch.log_softmax(model.eval()(tokens).logits.double(), -1) for model in models
        )
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def main() -> int:
    """Runs the benchmark or the check; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, help="words of the vocabulary (default: 128256)")
    parser.add_argument("--small", action="store_true", help="narrow layers, for a rehearsal")
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--calibrate", default=DEFAULT_CALIBRATION)
    parser.add_argument("--refine", action="store_true")
    parser.add_argument("--codec", default="zstd")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--baseline", action="store_true", help="run the eight prompts too")
    parser.add_argument("--check", action="store_true", help="compare the device with the CPU")
    parser.add_argument("--folder", type=Path, help="where models are written (default: TMPDIR)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="codecllm-convert-", dir=options.folder) as name:
        folder = Path(name)
        if options.check:
            result = check(folder, options)
            print(json.dumps({key: result[key] for key in result if key != "runs"}, indent=1))
            right = all(result[key] for key in result if key.startswith("same"))
        else:
            sizes, device = SMALL if options.small else FULL, device_of(options.device)
            if options.vocab is not None:
                sizes = sizes | {"vocab_size": options.vocab}
            began = time.perf_counter()
            weights = write_model(folder / "source", sizes, options.layers, device)
            print(f"{weights:,} weights written in {time.perf_counter() - began:.1f} s", flush=True)
            result, right = measure(folder / "source", folder / "out", options), True
            print(table(result))
            print(*result["warnings"], result["baseline"], sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
