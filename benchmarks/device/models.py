"""Models to load and run: an eighth of Llama 3.1 8B with random weights.

Four of 32 layers, an eighth of the vocabulary.

Each matrix of the layers has its true shape, so times are those of the whole model divided by
eight, but for the parts that do not depend on the number of layers.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.device.llama import FULL, matrix_shapes, norm_names, write_config
from benchmarks.device.machine import Machine, Row
from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader import from_pretrained
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.host.workers import Job, WorkerThreads

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LAYERS, VOCABULARY, WHOLE = 4, 128256 // 8, 8
SMALL_CHUNKS = 32
"""KiB of symbols in the chunks of the container for `compressed`: more chunks decode at once."""

KINDS: tuple[tuple[str, str, int], ...] = (
    ("int8", "zstd", 128),
    ("int8", "rans", 128),
    ("int8", "rans", SMALL_CHUNKS),
    ("lossless", "zstd", 128),
    ("lossless", "rans", 128),
)
"""Scheme, codec and KiB of symbols in a chunk of each container."""

_SAMPLES = 40


@dataclass(frozen=True, slots=True)
class Made:
    """A source and its containers.

    Attributes:
        held: removes the folder.
        source: folder of the bf16 checkpoint.
        containers: by kind.
        seconds: that their conversion took, all at once, each in a process.
        weights: number of all weights.
    """

    held: TemporaryDirectory[str]
    source: Path
    containers: dict[tuple[str, str, int], Path]
    seconds: dict[tuple[str, str, int], float]
    weights: int


@cache
def made_models(machine: Machine) -> Made:
    """Makes a source and its containers once, in a folder that is deleted at exit."""
    scratch = TemporaryDirectory(prefix="codecllm-gpu-")
    folder = Path(scratch.name)
    source = folder / "source"
    weights = write_source(machine, source)
    containers = {kind: folder / "-".join(map(str, kind)) for kind in KINDS}
    with ProcessPoolExecutor(len(KINDS), multiprocessing.get_context("spawn")) as pool:
        jobs = {kind: pool.submit(_convert, source, out, kind) for kind, out in containers.items()}
        seconds = {kind: job.result() for kind, job in jobs.items()}
    return Made(scratch, source, containers, seconds, weights)


def _convert(source: Path, out: Path, kind: tuple[str, str, int]) -> float:
    start = time.perf_counter()
    convert(source, out, scheme=kind[0], codec=kind[1], chunk_kib=kind[2])
    return time.perf_counter() - start


def write_source(machine: Machine, folder: Path, layers: int = LAYERS) -> int:
    """Writes N(0, 0.02) weights whose rows differ in size; returns the number of weights."""
    folder.mkdir()
    sizes = SMALL | {"vocab_size": 512} if machine.small else FULL | {"vocab_size": VOCABULARY}
    tensors = {
        name: torch.ones(sizes["hidden_size"], dtype=torch.bfloat16) for name in norm_names(layers)
    }
    matrices = matrix_shapes(sizes, layers)
    for name, shape in matrices.items():
        scale = 0.02 * torch.exp(0.3 * torch.randn(shape[0], 1, device=machine.device))
        tensors[name] = (torch.randn(shape, device=machine.device) * scale).to(torch.bfloat16).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, sizes, layers)
    return sum(rows * cols for rows, cols in matrices.values())


def _seconds(machine: Machine, work: Callable[[], Any]) -> tuple[float, Any]:
    machine.synchronize()
    start = time.perf_counter()
    result = work()
    machine.synchronize()
    return time.perf_counter() - start, result


def _read(folder: Path) -> None:
    """Reads every chunk into memory and compares its checksum, in threads, as a load does."""
    with (
        Container(folder) as container,
        closing(WorkerThreads(decoding_threads(None))) as workers,
    ):
        names = [
            record.name
            for record in container.manifest.tensors
            if record.scheme in ("int8", "lossless")
        ]
        jobs: list[Job] = []
        for tensor in (container.tensor(name) for name in names):
            assert isinstance(tensor, StoredTensor)
            chunks = len(tensor.table.records)
            for first in range(0, chunks, 64):
                jobs.append(partial(_read_chunks, tensor, first, min(first + 64, chunks)))
        workers.run_all(jobs)


def _read_chunks(tensor: StoredTensor, first: int, last: int, _workspace: object) -> None:
    slots = tensor.read_slots(first, last, bytearray(tensor.slots_bytes(first, last)))
    for chunk in range(first, last):
        tensor.stored_chunk(chunk, slots, first)


def load_source(machine: Machine, source: Path) -> Any:
    """Loads the source as transformers does, in bf16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, device_map=machine.device.type
    )


def _copy_seconds(machine: Machine, size: int) -> float:
    host_bytes = torch.empty(size, dtype=torch.uint8, pin_memory=not machine.rehearses)
    device_bytes = torch.empty(size, dtype=torch.uint8, device=machine.device)
    return machine.seconds([lambda: device_bytes.copy_(host_bytes, non_blocking=True)])


def loading(machine: Machine) -> Iterator[Row]:
    """Seconds to load, warm cache, beside plain transformers and a bare read and copy."""
    models = made_models(machine)
    plain = min(_seconds(machine, lambda: load_source(machine, models.source))[0] for _ in range(3))
    note = f"{models.weights / 1e9:.2f}e9 weights; {plain * WHOLE:.2f} s for 8B at this rate"
    yield Row("load, plain transformers, bf16", plain, "s", note)
    size = sum(path.stat().st_size for path in models.source.glob("*.safetensors"))
    yield Row("copy alone, bf16", _copy_seconds(machine, size), "s", f"{size / 1e9:.2f} GB")
    for kind, folder in models.containers.items():
        what, (scheme, codec, _) = _named(kind), kind
        stored_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        yield Row(
            f"convert, {what}",
            models.seconds[kind],
            "s",
            f"{size / 1e9 / models.seconds[kind]:.2f} GB of source a second",
        )
        read = min(_seconds(machine, partial(_read, folder))[0] for _ in range(2))
        yield Row(
            f"read and check alone, {what}",
            read,
            "s",
            f"{stored_bytes / 1e9:.2f} GB, {stored_bytes / read / 1e9:.1f} GB/s",
        )
        yield Row(f"copy alone, {what}", _copy_seconds(machine, stored_bytes), "s", "")
        for resident in (
            ("dense", "int8", "packed", "compressed")
            if scheme == "int8"
            else ("dense", "packed", "compressed")
        ):
            yield _load_row(machine, folder, what, resident, "auto", plain)
        if (scheme, codec) == ("int8", "zstd") and not machine.rehearses:
            yield _load_row(machine, folder, what, "dense", "cpu", plain)


def _named(kind: tuple[str, str, int]) -> str:
    return f"{kind[0]} {kind[1]} {kind[2]} KiB"


def _load_row(
    machine: Machine, folder: Path, what: str, resident: str, decoder: str, plain: float
) -> Row:
    try:
        seconds = min(
            _seconds(machine, partial(load_container, machine, folder, resident, decoder))[0]
            for _ in range(3)
        )
    except Exception as exc:
        return Row(
            f"load {resident}, {what}, decoder {decoder}", False, note=f"failed: {exc!r}"[:300]
        )
    note = f"{plain / seconds:.2f}x as fast as plain; {seconds * WHOLE:.2f} s for 8B at this rate"
    return Row(f"load {resident}, {what}, decoder {decoder}", seconds, "s", note)


def load_container(machine: Machine, folder: Path, resident: str, decoder: str = "auto") -> Any:
    """Loads a container onto the device."""
    placing = {} if machine.rehearses else {"device_map": "cuda"}
    return from_pretrained(
        folder,
        resident=resident,  # type: ignore[arg-type]
        decoder=decoder,
        progress=False,
        **placing,
    )


def generating(machine: Machine) -> Iterator[Row]:
    """Tokens a second of each residency against dense, and whether the tokens are equal."""
    models = made_models(machine)
    cases = [
        (("lossless", "zstd", 128), "dense"),
        (("int8", "rans", 128), "dense"),
        (("int8", "rans", 128), "int8"),
        (("int8", "rans", 128), "packed"),
        (("lossless", "zstd", 128), "packed"),
    ]
    cases += [(kind, "compressed") for kind in KINDS]
    first: float | None = None
    tokens: dict[str, list[int]] = {}
    for kind, resident in cases:
        what = f"{resident}, {_named(kind)}"
        try:
            model = load_container(machine, models.containers[kind], resident)
            seconds, how, greedy_tokens = _token_seconds(machine, model)
        except Exception as exc:
            yield Row(f"token, {what}", False, note=f"failed: {exc!r}"[:300])
            continue
        first = first or seconds
        alike = tokens.setdefault(kind[0], greedy_tokens) == greedy_tokens
        speed = (
            f"{first / seconds:.2f}x as fast as dense bf16; "
            f"{1 / (seconds * WHOLE):.1f} tokens/s for 8B"
        )
        note = f"{how}; {speed}; same tokens: {alike}"
        numbers = {"tokens_alike": alike, "memory": _held(machine)}
        yield Row(f"token, {what}", 1 / seconds, "tokens/s", note, numbers)
        del model


def _held(machine: Machine) -> int:
    return 0 if machine.rehearses else torch.cuda.memory_allocated()


def token_step(model: Any, batch: int = 1) -> tuple[Callable[[], None], torch.Tensor]:
    """Returns a call that adds a greedy token to each sequence, and the tokens, int64 [batch, 1].

    A CUDA graph can hold the call: the cache has a fixed size.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=512)
    token = torch.ones(batch, 1, dtype=torch.int64, device=model.device)

    def step() -> None:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    return step, token


def _token_seconds(machine: Machine, model: Any) -> tuple[float, str, list[int]]:
    """Returns seconds per greedy token, how they were taken, and the tokens."""
    samples = _SAMPLES if not machine.small else 2
    step, token = token_step(model)
    with torch.inference_mode():
        tokens = []
        for _ in range(8 if not machine.small else 3):
            step()
            tokens.append(int(token))
        run, how = step, "launch by launch"
        if not machine.rehearses:
            with suppress(Exception):
                run, how = graphed(step), "CUDA graph"
        run()
        seconds, _ = _seconds(machine, lambda: [run() for _ in range(samples)])
    return seconds / samples, how, tokens


def graphed(step: Callable[[], None]) -> Callable[[], object]:
    """Returns a call that replays `step` from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
