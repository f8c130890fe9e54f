"""The fault library: each function breaks a model, container or loader; states the finding.

Containers are rewritten with every checksum, digest and size made to fit, so that nothing but the
content gives them away.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from codecllm.formats.checksums import xxh3
from codecllm.formats.codecs import CODECS
from codecllm.formats.container import Container
from codecllm.formats.reference import read_codes
from codecllm.formats.schemes.int8 import channel_scales
from codecllm.formats.shards.chunk_table import RECORD, pack_chunk_table, slot_bytes
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader import from_pretrained
from codecllm.loader.resident.int8_form import Int8Form
from tests import tampering
from tests.malformed.builders import Tensors, rewrite_shard

UP = "model.layers.1.mlp.up_proj.weight"
KEYS = "model.layers.1.self_attn.k_proj.weight"
SQUARE = "model.layers.0.self_attn.q_proj.weight"

Codes = NDArray[np.int8]
Scales = NDArray[np.float32]


def rewrite_tensor(
    folder: Path, name: str, edit: Callable[[Codes, Scales], tuple[Codes, Scales]]
) -> None:
    """Replaces codes [rows, cols] and scales of an int8 tensor; all checksums and sizes fit."""
    with Container(folder) as container:
        stored = container.tensor(name)
        assert isinstance(stored, StoredTensor) and stored.scales is not None
        grid, planes = stored.table.grid, stored.table.planes
        codes, scales = edit(read_codes(stored).copy(), stored.scales.copy())
    slots, records = [], np.zeros(len(grid), RECORD)
    for index, tile in enumerate(grid):
        symbols = np.ascontiguousarray(
            codes[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols]
        ).tobytes()
        packed = CODECS[1].encode(symbols)
        codec, data = (1, packed) if len(packed) < len(symbols) else (0, symbols)
        slots.append(data.ljust(slot_bytes(len(data)), b"\0"))
        records[index]["stored_bytes"], records[index]["codec"], records[index]["xxh3"] = (
            len(data),
            codec,
            xxh3(slots[-1]),
        )

    def put(tensors: Tensors) -> None:
        payload = b"".join(slots)
        tensors[name] = ("U8", [len(payload)], bytearray(payload))
        table = pack_chunk_table(grid, planes, records)
        tensors[name + "_chunks"] = ("U8", [len(table)], bytearray(table))
        tensors[name + "_scale"] = ("F32", [len(scales)], bytearray(scales.astype("<f4").tobytes()))

    rewrite_shard(folder, put)
    digest = hashlib.sha256(codes.tobytes() + scales.astype("<f4").tobytes()).hexdigest()

    def fit(document: dict[str, Any]) -> None:
        record = next(record for record in document["tensors"] if record["name"] == name)
        finite = scales[np.isfinite(scales)]
        codec = CODECS[int(records["codec"].max())].name
        record["planes"][0].update(stored_bytes=int(records["stored_bytes"].sum()), codec=codec)
        record.update(digest=digest, scale_range=[float(finite.min()), float(finite.max())])

    tampering.reseal(folder, fit)


def source_weights(source: Path, name: str) -> NDArray[np.float32]:
    """Returns a tensor of a one-file source as float32."""
    return load_file(source / "model.safetensors")[name].float().numpy()


def edit_source(
    source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    """Copies a one-file source and edits its tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    return target


def corrupt_payload(folder: Path) -> None:
    """Changes three codes of one row."""

    def edit(codes: Codes, scales: Scales) -> tuple[Codes, Scales]:
        codes[37, 5:8] = np.where(codes[37, 5:8] > 0, -11, 11)
        return codes, scales

    rewrite_tensor(folder, UP, edit)


def shift_payload(folder: Path) -> None:
    """Writes the codes three elements late, as an encoder does that forgot to skip a header."""
    rewrite_tensor(
        folder,
        UP,
        lambda codes, scales: (np.roll(codes.reshape(-1), 3).reshape(codes.shape), scales),
    )


def swap_scales(folder: Path) -> None:
    """Exchanges the scales of channels 5 and 9."""

    def edit(codes: Codes, scales: Scales) -> tuple[Codes, Scales]:
        scales[[5, 9]] = scales[[9, 5]]
        return codes, scales

    rewrite_tensor(folder, UP, edit)


def requantize(
    folder: Path, source: Path, name: str, scales_of: Callable[[Scales], Scales]
) -> None:
    """Quantizes a tensor of the source again with scales of one's own."""
    weights = source_weights(source, name)

    def edit(codes: Codes, scales: Scales) -> tuple[Codes, Scales]:
        chosen = scales_of(scales).astype(np.float32)
        return np.clip(np.rint(weights / chosen[:, None]), -127, 127).astype(np.int8), chosen

    rewrite_tensor(folder, name, edit)


def coarse_step(folder: Path, source: Path) -> None:
    """Quantizes one layer's tensor with a step ten times too large."""
    requantize(folder, source, UP, lambda scales: scales * np.float32(10))


def per_tensor_scale(folder: Path, source: Path) -> None:
    """Gives all channels the scale of the tensor's largest weight."""
    whole = channel_scales(np.abs(source_weights(source, UP)).max(keepdims=True).reshape(1))
    requantize(folder, source, UP, lambda scales: np.full_like(scales, whole[0]))


def fp16_scales(folder: Path) -> None:
    """Rounds the scales of one tensor to float16."""

    def edit(codes: Codes, scales: Scales) -> tuple[Codes, Scales]:
        with np.errstate(over="ignore"):
            return codes, scales.astype(np.float16).astype(np.float32)

    rewrite_tensor(folder, UP, edit)


def swap_heads(folder: Path) -> None:
    """Exchanges the two key heads of 16 rows, codes and scales together."""

    def edit(codes: Codes, scales: Scales) -> tuple[Codes, Scales]:
        order = np.r_[16:32, 0:16]
        return codes[order], scales[order]

    rewrite_tensor(folder, KEYS, edit)


def interleave_heads(folder: Path) -> None:
    """Puts the rows of each query head into the order of interleaved rotary embeddings."""

    def edit(codes: Codes, scales: Scales) -> tuple[Codes, Scales]:
        order = np.arange(len(codes)).reshape(-1, 2, 8).transpose(0, 2, 1).reshape(-1)
        return codes[order], scales[order]

    rewrite_tensor(folder, SQUARE, edit)


def large_channel(tensors: dict[str, torch.Tensor]) -> None:
    """Gives one channel weights whose scale float16 cannot hold (1e7 / 127 is above 65504)."""
    tensors[UP][21] *= 1e8


def outlier(tensors: dict[str, torch.Tensor]) -> None:
    """Makes one weight a thousand times as large as the others."""
    tensors[UP][17, 3] = 300.0


def nan_channel(tensors: dict[str, torch.Tensor]) -> None:
    """Fills a channel with NaN."""
    tensors[UP][12] = float("nan")


def other_revision(tensors: dict[str, torch.Tensor]) -> None:
    """Trains on: every weight moves a little."""
    generator = torch.Generator().manual_seed(7)
    for value in tensors.values():
        value += (torch.randn(value.shape, generator=generator) * 0.01 * value.float().std()).to(
            value.dtype
        )


def loading(broken: Callable[[Any, Path], None], *, only: str | None = None) -> Callable[..., Any]:
    """Returns a loader that breaks the model after the load; `only` names the residency."""

    def load(folder: Path, *, resident: str) -> Any:
        model = from_pretrained(folder, resident=resident)
        if only in (None, resident):
            with torch.no_grad():
                broken(model, folder)
        return model

    return load


def parts(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes as float32 [rows, cols] and scales float32 [rows]."""
    with Container(folder) as container:
        stored = container.tensor(name)
        assert isinstance(stored, StoredTensor) and stored.scales is not None
        return torch.from_numpy(read_codes(stored).astype(np.float32)), torch.from_numpy(
            stored.scales.copy()
        )


def put_weight(model: Any, name: str, value: torch.Tensor) -> None:
    """Overwrites a dense weight."""
    parameter = model.get_parameter(name)
    parameter.copy_(value.to(parameter.dtype))


def scales_along_wrong_axis(model: Any, folder: Path) -> None:
    """Multiplies the codes of a square matrix by scales along axis 1."""
    codes, scales = parts(folder, SQUARE)
    put_weight(model, SQUARE, codes * scales[None, :])


def scales_through_fp16(model: Any, folder: Path) -> None:
    """Dequantizes with scales in float16."""
    codes, scales = parts(folder, UP)
    put_weight(model, UP, codes * scales.half().float()[:, None])


def scales_twice(model: Any, folder: Path) -> None:
    """Applies the scales to weights that are dequantized already."""
    codes, scales = parts(folder, UP)
    put_weight(model, UP, codes * scales[:, None] * scales[:, None])


def no_scales(model: Any, folder: Path) -> None:
    """Forgets the scales."""
    put_weight(model, UP, parts(folder, UP)[0])


def shifted_decoder(model: Any, folder: Path) -> None:
    """Returns a buffer that begins four elements late."""
    value = model.get_parameter(UP)
    value.copy_(torch.roll(value.reshape(-1), 4).reshape(value.shape))


def random_layer(model: Any, folder: Path) -> None:
    """Leaves a layer as it was initialised."""
    value = model.get_parameter(UP)
    value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) * 0.02)


def plain_module(model: Any, folder: Path) -> None:
    """Puts a plain linear layer back where a coded weight has to be."""
    name = UP.removesuffix(".weight")
    old = model.get_submodule(name)
    new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=model.dtype)
    new.weight.copy_(old.weight)
    model.set_submodule(name, new)


class Wrapper(nn.Module):
    """A second patch of a module: a shell that multiplies by the int8 scales once more."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs) * self.inner.weight.form.matrix.scale.to(inputs.dtype)


def replaced_twice(model: Any, folder: Path) -> None:
    """Replaces a module that was replaced already."""
    name = UP.removesuffix(".weight")
    inner = model.get_submodule(name)
    assert isinstance(inner.weight.form, Int8Form)
    model.set_submodule(name, Wrapper(inner))


def fp16_module_scales(model: Any, folder: Path) -> None:
    """Casts the scales of an int8 weight to float16."""
    form = model.get_parameter(UP).form
    form.matrix = replace(form.matrix, scale=form.matrix.scale.half())


def swapped_loaded_heads(model: Any, folder: Path) -> None:
    """Loads the key heads in another order."""
    value = model.get_parameter(KEYS)
    value.copy_(value[torch.arange(32).roll(16)])


def stale_kv_layout(model: Any, folder: Path) -> None:
    """Right weights, but key heads in another order, as a stale cache layout gives."""
    module = model.get_submodule(KEYS.removesuffix(".weight"))
    module.register_forward_hook(
        lambda module, inputs, output: output[..., torch.arange(32).roll(16)]
    )


def stale_cache(model: Any, folder: Path) -> None:
    """Right weights and code; the heads of the prompt's cache lie in another order."""

    def exchange(module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        cache = options["past_key_values"]
        if cache is not None and cache.get_seq_length(1) and not hasattr(cache, "exchanged"):
            layer, cache.exchanged = cache.layers[1], True
            layer.keys, layer.values = layer.keys.flip(1), layer.values.flip(1)

    model.get_submodule("model.layers.1.self_attn").register_forward_pre_hook(
        exchange, with_kwargs=True
    )


def late_key_heads(model: Any, folder: Path) -> None:
    """Writes a single token's key with its heads in another order: a cache of two layouts."""

    def exchange(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output[..., torch.arange(32).roll(16)] if output.shape[1] == 1 else output

    model.get_submodule(KEYS.removesuffix(".weight")).register_forward_hook(exchange)


def keeps_source_weight(model: Any, folder: Path) -> None:
    """Leaves a layer as it was in the source: the weight that `folder`'s codes were made from."""
    put_weight(model, UP, torch.from_numpy(source_weights(folder.parent / "source", UP)))


def attention_scaled(model: Any, folder: Path) -> None:
    """Leaves every module alone and computes attention itself with another scale."""
    model.get_submodule("model.layers.1.self_attn").scaling *= 30


def scaled_output(model: Any, folder: Path) -> None:
    """Leaves the weights alone and computes one output channel wrongly."""
    module = model.get_submodule(UP.removesuffix(".weight"))

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., 29] *= -3
        return output

    module.register_forward_hook(hook)


def negated_logits(model: Any, folder: Path) -> None:
    """Computes the output layer with the wrong sign."""
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)


def untied(model: Any, folder: Path) -> None:
    """Gives the output layer memory of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())


def on_meta(model: Any, folder: Path) -> None:
    """Leaves a parameter without data."""
    module = model.get_submodule(UP.removesuffix(".weight"))
    module.weight = nn.Parameter(
        torch.empty_like(module.weight, device="meta"), requires_grad=False
    )


def wrong_tensor(model: Any, folder: Path) -> None:
    """Loads one tensor under the name of another."""
    put_weight(model, UP, model.get_parameter(UP.replace("layers.1", "layers.0")))


def swapped_loaded_scales(model: Any, folder: Path) -> None:
    """Dequantizes two channels with each other's scales."""
    codes, scales = parts(folder, UP)
    scales[[5, 9]] = scales[[9, 5]]
    put_weight(model, UP, codes * scales[:, None])


def write_tokenizer(folder: Path, *, shifted: bool = False) -> None:
    """Adds a byte-level tokenizer of 259 tokens; `shifted`: the letters have other ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = alphabet[1:] + alphabet[:1] if shifted else alphabet
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        letter: 3 + i for i, letter in enumerate(alphabet)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
