"""Load models that are no containers: plain folders, offloaded ones, GGUF files."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from codecllm.formats import limits
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    ModelMismatchError,
    UnsafePathError,
    UnsupportedEnvironmentError,
    foreign_errors_as,
    shown,
)
from codecllm.hub import no_requests
from codecllm.loader.config_size import check_config_of, check_config_size, refuse_larger
from codecllm.loader.hf.folder import alone, read_config
from codecllm.loader.hf.gguf_header import check_gguf
from codecllm.loader.hf.listed import ModelFiles
from codecllm.loader.hf.model_class import model_class, strip_quantization
from codecllm.loader.hf.quiet import silenced
from codecllm.loader.hf.remote_code import building
from codecllm.loader.torch_tensors import torch_dtype

TOO_LARGE = 2
"""A model with so many times the weights of its files is not built.

Heads that training adds later may be missing from the files; they are small.
"""

ADAPTER_CONFIG = "adapter_config.json"


def load_plain(folder: Path, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """Loads a plain model from its folder into the class that its config names, on the CPU.

    An adapter of PEFT in the folder is left, as a conversion leaves it.

    Args:
        folder: the model's folder.
        dtype: dtype of its weights; "auto" keeps its own.
        options: further arguments of transformers' `from_pretrained`.

    Raises:
        UnsupportedEnvironmentError: this transformers cannot read the config, or has no class, or
            the folder's path is not UTF-8.
        ModelMismatchError: the config describes a much larger model than the files hold.
        UnsafePathError: an index names weight files of another folder, or a weight file is none.
        Exception: transformers cannot load the model; the type is any.
    """
    _refuse_path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would apply it where peft is installed. Below a file it finds none.
        options["adapter_kwargs"] = {"subfolder": "config.json"}
    config = read_config(folder)
    _check_weight_files(folder, getattr(config, "transformers_weights", None))
    with silenced(), building():
        cls = model_class(config, partial(_described, folder))
        _check_size(cls, config, folder)
        return cls.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, **options
        )


def load_offloaded(folder: Path, offload_folder: Path, memory_bytes: int) -> Any:
    """Loads a plain model as `load_plain` does, and leaves blocks beyond `memory_bytes` on disk.

    These blocks are read when they run.
    """
    return load_plain(
        folder,
        device_map="auto",
        max_memory={"cpu": memory_bytes},
        offload_folder=offload_folder,
    )


def load_gguf(path: Path, dtype: torch.dtype) -> Any:
    """Loads a GGUF file into the class that its metadata name, every tensor as `dtype`.

    Raises:
        FormatError: the file is damaged; see `check_gguf`.
        ModelMismatchError: the metadata describe a much larger model than the file holds.
        Exception: transformers cannot load the model; the type is any.
    """
    shapes = check_gguf(path).tensors.values()
    with alone(path) as folder, silenced():
        return _load_gguf(folder, path.name, dtype, shapes)


def _load_gguf(folder: Path, name: str, dtype: torch.dtype, shapes: Collection[Any]) -> Any:
    from transformers import modeling_gguf_pytorch_utils as reader

    with no_requests("the reader of GGUF files"):
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=name)
    check_config_size(config.to_dict(), len(shapes), max(map(max, shapes), default=0))
    with building(), torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    needed, held = sum(one.numel() for one in empty.parameters()), sum(map(prod, shapes))
    if needed > TOO_LARGE * held:
        raise ModelMismatchError(
            "the metadata describe a much larger model", file=name, got=needed, expected=held
        )
    refuse_larger(empty, held)
    bar = getattr(reader, "tqdm", None)
    reader.tqdm = lambda tensors, **_: tensors  # its progress bar knows no switch
    try:
        with building():
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=dtype, trust_remote_code=False
            )
    finally:
        reader.tqdm = bar


def linear_modules(model: ModelFiles) -> list[str]:
    """Returns the names of the nn.Linear modules of the class that a model's config names.

    No weights are read or made.

    Raises:
        UnsupportedEnvironmentError: this transformers cannot read the config, or has no class.
        ModelMismatchError: the class cannot be built from the config, or is far larger.
    """
    modules = _empty_model(model).named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear)]


def parameter_count(model: ModelFiles) -> int:
    """Returns the number of weights of the class that a model's config names; ties count once.

    No weights are read or made.

    Raises:
        UnsupportedEnvironmentError: this transformers cannot read the config, or has no class.
        ModelMismatchError: the class cannot be built from the config, or is far larger.
    """
    return sum(parameter.numel() for parameter in _empty_model(model).parameters())


def _empty_model(model: ModelFiles) -> nn.Module:
    config = read_config(model)
    if isinstance(model, Container):
        # Before modules are made: a hundred thousand layers take minutes on any device.
        check_config_of(model, config.to_dict())
    strip_quantization(config)
    cls = model_class(config)
    # A class raises any type for a damaged config.
    message = f"transformers could not build {cls.__name__}"
    errors = foreign_errors_as(ModelMismatchError, message, file="config.json", limit=300)
    with errors, silenced(), building(), torch.device("meta"):
        empty: nn.Module = cls(config)
    return empty


def _refuse_path(folder: Path) -> None:
    try:
        str(folder).encode()
    except UnicodeEncodeError as exc:
        raise UnsupportedEnvironmentError(
            "safetensors opens no file of a folder whose path is not UTF-8: rename it",
            file=ascii(str(folder))[1:-1],
        ) from exc


def _check_weight_files(folder: Path, explicit: Any) -> None:
    """Refuses weight files that safetensors must not open: for a pipe it waits for ever.

    Args:
        folder: the model's.
        explicit: what its config names as the weights, a file or an index, if that is text.
    """
    names = {path.name for path in folder.glob("*.safetensors")}
    indexes = [*folder.glob("*.index*.json")]
    if isinstance(explicit, str):
        names.add(explicit)
        indexes.append(folder / explicit)
    for index in indexes:
        names |= _indexed(index)
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UnsafePathError("the weights lie in another folder", got=shown(name))
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise UnsafePathError("not a regular file", file=shown(name)[1:-1])


def _indexed(index: Path) -> set[str]:
    """Returns the names in an index; none where it cannot be read, which transformers tells."""
    if not index.is_file() or index.stat().st_size > limits.MANIFEST_BYTES:
        return set()
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {name for name in weight_map.values() if isinstance(name, str)}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return set()


def _check_size(cls: Any, config: Any, folder: Path) -> None:
    """Refuses a config whose model is much larger than the files: missing weights are made up.

    They would be made in memory, before transformers compares any shape: a config without sizes
    describes a model of billions of weights.
    """
    # Packed weights of other libraries are no count of parameters.
    if getattr(config, "quantization_config", None) is not None:
        return
    stored_weights = sum(tensor.numel() for tensor in _described(folder).values())
    try:
        # A copy: building a model writes into its config.
        with torch.device("meta"):
            empty = cls(copy.deepcopy(config))
    except Exception:  # the load itself says why the class cannot be built, with any type
        return
    config_weights = sum(parameter.numel() for parameter in empty.parameters())
    if config_weights > TOO_LARGE * stored_weights:
        raise ModelMismatchError(
            "the config describes a larger model: parameters",
            got=stored_weights,
            expected=config_weights,
            file="config.json",
        )
    refuse_larger(empty, stored_weights)  # buffers too


def _described(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a folder's weight files on the meta device, from their headers."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                part = file.get_slice(name)
                dtype = torch_dtype(part.get_dtype(), name)
                tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return tensors
