"""Writes a Llama with random weights, tensor by tensor, and a tokenizer for it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.device.llama import matrix_shapes, norm_names, write_config

_SHARD_BYTES = 5 << 30
_START, _END = "<s>", "</s>"


def write_model(folder: Path, sizes: dict[str, int], layers: int, device: torch.device) -> int:
    """Writes weights, config and tokenizer of a Llama in bf16; returns the number of weights.

    Rows of a matrix differ in size; matrices that add to the residual stream are smaller, the more
    layers there are. Shards have 5 GiB.

    Args:
        folder: is made.
        sizes: of the configuration, `vocab_size` too: 1,024 or more.
        layers: their number.
        device: where the random numbers come from.
    """
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {**matrix_shapes(sizes, layers)}
    shapes |= dict.fromkeys(norm_names(layers), (sizes["hidden_size"],))
    generator = torch.Generator(device).manual_seed(0)
    shards = list(_shards(shapes))
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, name)
        _write_shard(folder / name, shard, layers, generator)
    weights = sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": 2 * weights}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(folder, sizes, layers)
    _write_tokenizer(folder, sizes["vocab_size"])
    return weights


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    shard_bytes = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if shard and shard_bytes + size > _SHARD_BYTES:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = shape
        shard_bytes += size
    yield shard


def _write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], layers: int, generator: torch.Generator
) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for part in _random(name, shape, layers, generator):
                file.write(part.to(torch.bfloat16).cpu().view(torch.int16).numpy())


def _random(
    name: str, shape: tuple[int, ...], layers: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    device = generator.device
    if len(shape) == 1:
        yield torch.ones(shape, device=device)
        return
    spread = (
        0.02 / (2 * layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
    )
    for first in range(0, shape[0], 8192):
        rows = min(8192, shape[0] - first)
        sizes = spread * torch.exp(0.3 * torch.randn(rows, 1, generator=generator, device=device))
        yield sizes * torch.randn(rows, shape[1], generator=generator, device=device)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Writes a byte-level tokenizer whose words come from the calibration text of the package."""
    text = files("codecllm.calibrator").joinpath("mixed_text.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>", _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A", special_tokens=[(_START, tokenizer.token_to_id(_START))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_START, eos_token=_END, unk_token="<unk>"
    )
    fast.save_pretrained(folder)
