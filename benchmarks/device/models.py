"""Models to load and run: an eighth of Llama 3.1 8B with random weights.

Four of 32 layers, an eighth of the vocabulary.

Each matrix of the layers has its true shape, so times are those of the whole model divided by
eight, but for the parts that do not depend on the number of layers.
"""

from __future__ import annotations

import json
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

from benchmarks.device.machine import Machine, Row
from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader import from_pretrained
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.host.workers import Job, WorkerThreads

FULL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
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
    source, weights = _write_source(machine, folder / "source")
    containers = {kind: folder / "-".join(map(str, kind)) for kind in KINDS}
    with ProcessPoolExecutor(len(KINDS), multiprocessing.get_context("spawn")) as pool:
        jobs = {kind: pool.submit(_convert, source, out, kind) for kind, out in containers.items()}
        seconds = {kind: job.result() for kind, job in jobs.items()}
    return Made(scratch, source, containers, seconds, weights)


def _convert(source: Path, out: Path, kind: tuple[str, str, int]) -> float:
    start = time.perf_counter()
    convert(source, out, scheme=kind[0], codec=kind[1], chunk_kib=kind[2])
    return time.perf_counter() - start


def _write_source(machine: Machine, folder: Path) -> tuple[Path, int]:
    """Writes N(0, 0.02) weights whose rows differ in size; returns folder and number of weights."""
    folder.mkdir()
    sizes, vocabulary = (SMALL, 512) if machine.small else (FULL, VOCABULARY)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    parts = {
        "q": (hidden, hidden),
        "k": (narrow, hidden),
        "v": (narrow, hidden),
        "o": (hidden, hidden),
    }
    shapes = {f"self_attn.{name}_proj": shape for name, shape in parts.items()}
    shapes |= {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    matrices = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for layer in range(LAYERS):
        matrices |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    norms = [
        f"model.layers.{n}.{name}_layernorm"
        for n in range(LAYERS)
        for name in ("input", "post_attention")
    ]
    tensors = {
        f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16)
        for name in (*norms, "model.norm")
    }
    for name, shape in matrices.items():
        scale = 0.02 * torch.exp(0.3 * torch.randn(shape[0], 1, device=machine.device))
        tensors[f"{name}.weight"] = (
            (torch.randn(shape, device=machine.device) * scale).to(torch.bfloat16).cpu()
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **sizes,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": LAYERS,
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, sum(rows * cols for rows, cols in matrices.values())


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


def _plain(machine: Machine, source: Path) -> Any:
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
    plain = min(_seconds(machine, lambda: _plain(machine, models.source))[0] for _ in range(3))
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
            _seconds(machine, partial(_ours, machine, folder, resident, decoder))[0]
            for _ in range(3)
        )
    except Exception as exc:
        return Row(
            f"load {resident}, {what}, decoder {decoder}", False, note=f"failed: {exc!r}"[:300]
        )
    note = f"{plain / seconds:.2f}x as fast as plain; {seconds * WHOLE:.2f} s for 8B at this rate"
    return Row(f"load {resident}, {what}, decoder {decoder}", seconds, "s", note)


def _ours(machine: Machine, folder: Path, resident: str, decoder: str = "auto") -> Any:
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
            model = _ours(machine, models.containers[kind], resident)
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


def _token_seconds(machine: Machine, model: Any) -> tuple[float, str, list[int]]:
    """Returns seconds per greedy token, how they were taken, and the tokens."""
    from transformers import StaticCache

    samples = _SAMPLES if not machine.small else 2
    cache = StaticCache(config=model.config, max_cache_len=512)
    token = torch.tensor([[1]], device=machine.device)

    def step() -> None:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    with torch.inference_mode():
        tokens = []
        for _ in range(8 if not machine.small else 3):
            step()
            tokens.append(int(token))
        run, how = step, "launch by launch"
        if not machine.rehearses:
            with suppress(Exception):
                run, how = _graphed(machine, step), "CUDA graph"
        run()
        seconds, _ = _seconds(machine, lambda: [run() for _ in range(samples)])
    return seconds / samples, how, tokens


def _graphed(machine: Machine, step: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
