"""Models to load and run: the layers and the vocabulary of Llama 3.1 8B with random weights, but four layers instead of 32."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.device.machine import Machine, Row
from codecllm.converter import convert
from codecllm.formats.container import Container, StoredTensor
from codecllm.loader import from_pretrained
from codecllm.loader.pool import DecodePool

FULL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS, WHOLE_LAYERS = 4, 32
CONTAINERS = (("int8", "zstd"), ("int8", "rans"), ("lossless", "zstd"), ("lossless", "rans"))
_SAMPLES = 40


@dataclass(frozen=True, slots=True)
class Made:
    """A source and its containers.

    Attributes:
        held: what removes the folder.
        source: folder of the bf16 checkpoint.
        containers: by scheme and codec.
        seconds: that their conversion took.
        weights: number of all weights.
        used: number of those that a token's forward pass reads.
        whole_weights, whole_used: the same of all 32 layers.
    """

    held: TemporaryDirectory[str]
    source: Path
    containers: dict[tuple[str, str], Path]
    seconds: dict[tuple[str, str], float]
    weights: int
    used: int
    whole_weights: int
    whole_used: int


@cache
def made_models(machine: Machine) -> Made:
    """Makes a source and its containers in a temporary folder, which goes when the program ends; once for all sections."""
    held = TemporaryDirectory(prefix="codecllm-gpu-")
    folder = Path(held.name)
    source, counts = _write_source(machine, folder / "source")
    containers, seconds = {}, {}
    for scheme, codec in CONTAINERS:
        containers[scheme, codec] = folder / f"{scheme}-{codec}"
        started = time.perf_counter()
        convert(source, containers[scheme, codec], scheme=scheme, codec=codec)
        seconds[scheme, codec] = time.perf_counter() - started
    return Made(held, source, containers, seconds, *counts)


def _write_source(machine: Machine, folder: Path) -> tuple[Path, tuple[int, int, int, int]]:
    """Writes a checkpoint of N(0, 0.02) weights whose rows differ in size; returns its folder and counts of weights."""
    folder.mkdir()
    sizes, vocabulary = (SMALL, 512) if machine.small else (FULL, 128256)
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    parts = {"q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in parts.items()}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    matrices = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for layer in range(LAYERS):
        matrices |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    norms = [f"model.layers.{n}.{name}_layernorm" for n in range(LAYERS) for name in ("input", "post_attention")]
    tensors = {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in (*norms, "model.norm")}
    for name, shape in matrices.items():
        scale = 0.02 * torch.exp(0.3 * torch.randn(shape[0], 1, device=machine.device))
        tensors[f"{name}.weight"] = (torch.randn(shape, device=machine.device) * scale).to(torch.bfloat16).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **sizes, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "dtype": "bfloat16",
        "vocab_size": vocabulary, "max_position_embeddings": 8192, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    layer = sum(rows * cols for rows, cols in shapes.values())
    head = vocabulary * hidden
    return folder, (
        LAYERS * layer + 2 * head,
        LAYERS * layer + head,
        WHOLE_LAYERS * layer + 2 * head,
        WHOLE_LAYERS * layer + head,
    )


def _seconds(machine: Machine, work: Callable[[], Any]) -> tuple[float, Any]:
    machine.synchronize()
    started = time.perf_counter()
    result = work()
    machine.synchronize()
    return time.perf_counter() - started, result


def _read(folder: Path) -> None:
    """Reads every chunk into memory and compares its checksum, in threads, as a load does."""
    with Container(folder) as container, DecodePool(container.decoding_threads(None)) as pool:
        names = [record.name for record in container.manifest.tensors if record.scheme in ("int8", "lossless")]
        jobs = []
        for tensor in (container.tensor(name) for name in names):
            assert isinstance(tensor, StoredTensor)
            chunks = len(tensor.table.records)
            for first in range(0, chunks, 64):
                jobs.append(pool.submit(partial(_read_chunks, tensor, first, min(first + 64, chunks))))
        for job in jobs:
            job.result()


def _read_chunks(tensor: StoredTensor, first: int, last: int, _workspace: object) -> None:
    slots = tensor.read_slots(first, last, bytearray(tensor.slots_bytes(first, last)))
    for chunk in range(first, last):
        tensor.stored_chunk(chunk, slots, first)


def _plain(machine: Machine, source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map=machine.device.type)


def _copy_seconds(machine: Machine, size: int) -> float:
    here = torch.empty(size, dtype=torch.uint8, pin_memory=not machine.rehearses)
    there = torch.empty(size, dtype=torch.uint8, device=machine.device)
    return machine.seconds([lambda: there.copy_(here, non_blocking=True)])


def loading(machine: Machine) -> Iterator[Row]:
    """Seconds to load, files in the page cache, beside plain transformers; and what reading and copying take alone."""
    made = made_models(machine)
    scale = made.whole_weights / made.weights
    plain = min(_seconds(machine, lambda: _plain(machine, made.source))[0] for _ in range(3))
    note = f"{made.weights / 1e9:.2f}e9 weights; {plain * scale:.2f} s for 8B at this rate"
    yield Row("load, plain transformers, bf16", plain, "s", note)
    size = sum(path.stat().st_size for path in made.source.glob("*.safetensors"))
    yield Row("copy alone, bf16", _copy_seconds(machine, size), "s", f"{size / 1e9:.2f} GB")
    for (scheme, codec), folder in made.containers.items():
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        read = min(_seconds(machine, lambda folder=folder: _read(folder))[0] for _ in range(2))
        yield Row(
            f"read and check alone, {scheme} {codec}", read, "s", f"{stored / 1e9:.2f} GB, {stored / read / 1e9:.1f} GB/s"
        )
        converted = made.seconds[scheme, codec]
        yield Row(f"convert, {scheme} {codec}", converted, "s", f"{size / 1e9 / converted:.2f} GB of source a second")
        yield Row(f"copy alone, {scheme} {codec}", _copy_seconds(machine, stored), "s", "")
        for resident in ("dense", "int8", "compressed") if scheme == "int8" else ("dense", "compressed"):
            for decoder in ("auto", "cpu") if resident == "dense" and not machine.rehearses else ("auto",):
                taken = min(_seconds(machine, partial(_ours, machine, folder, resident, decoder))[0] for _ in range(2))
                note = f"{plain / taken:.2f}x as fast as plain; {taken * scale:.2f} s for 8B at this rate"
                yield Row(f"load {resident}, {scheme} {codec}, decoder {decoder}", taken, "s", note)


def _ours(machine: Machine, folder: Path, resident: str, decoder: str = "auto") -> Any:
    placing = {} if machine.rehearses else {"device_map": "cuda"}
    return from_pretrained(folder, resident=resident, decoder=decoder, progress=False, **placing)  # type: ignore[arg-type]


def generating(machine: Machine) -> Iterator[Row]:
    """Seconds of one token's forward pass in each form of residency, against dense; and that the tokens are dense's."""
    made = made_models(machine)
    kinds = [("lossless", "zstd", "dense"), ("int8", "rans", "dense"), ("int8", "rans", "int8")]
    kinds += [("int8", "zstd", "compressed"), ("int8", "rans", "compressed"), ("lossless", "rans", "compressed")]
    scale = made.whole_used / made.used
    first: float | None = None
    tokens: dict[str, list[int]] = {}
    for scheme, codec, resident in kinds:
        try:
            model = _ours(machine, made.containers[scheme, codec], resident)
            taken, how, found = _token_seconds(machine, model)
        except Exception as exc:
            yield Row(f"token, {resident}, {scheme} {codec}", False, note=f"failed: {exc!r}"[:300])
            continue
        first = first or taken
        alike = tokens.setdefault(scheme, found) == found
        note = f"{how}; {first / taken:.2f}x as fast as dense bf16; {1 / (taken * scale):.1f} tokens/s for 8B at this rate"
        measured = {"tokens_alike": alike, "memory": _held(machine)}
        yield Row(f"token, {resident}, {scheme} {codec}", 1 / taken, "tokens/s", f"{note}; same tokens: {alike}", measured)
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
        found = []
        for _ in range(8 if not machine.small else 3):
            step()
            found.append(int(token))
        run, how = step, "launch by launch"
        if not machine.rehearses:
            with suppress(Exception):
                run, how = _graphed(machine, step), "CUDA graph"
        run()
        seconds, _ = _seconds(machine, lambda: [run() for _ in range(samples)])
    return seconds / samples, how, found


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
