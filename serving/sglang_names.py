"""Every name of SGLang that codecllm uses: no other file imports SGLang.

Private names are said to be so. `tests/serving/test_sglang_names.py` fails where one of them moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from codecllm.serving.loading import NAME

__all__ = [
    "DefaultModelLoader",
    "LoadConfig",
    "LoadFormat",
    "QuantizationConfig",
    "QuantizeMethodBase",
]

_GET_LOADER = "sglang.srt.model_loader.loader.get_model_loader"
"""The function that chooses a loader. SGLang has no list of loaders that a plug-in could extend."""


def register(config: type[QuantizationConfig], choose: Callable[..., Any]) -> None:
    """Registers the quantization config, and a function around SGLang's choice of a loader.

    Args:
        config: made for `quant_method: codecllm` of config.json.
        choose: gets SGLang's function and its arguments, and returns a loader.
    """
    if QUANTIZATION_METHODS.get(NAME) is config:
        return
    QUANTIZATION_METHODS[NAME] = config
    HookRegistry.register(_GET_LOADER, choose, HookType.AROUND)


def with_extra_config(load_config: LoadConfig, extra: Any) -> LoadConfig:
    """Returns a copy of a load config with another `model_loader_extra_config`."""
    return dataclasses.replace(load_config, model_loader_extra_config=extra)


def is_first_rank() -> bool:
    """Whether this process shows progress, as SGLang's own loaders decide it."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def renamed(
    loader: DefaultModelLoader, source: Any, tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields tensors under the names that SGLang gives to those of a source.

    A draft model that is a layer of several in the checkpoint gets that layer as its only one
    (private method).
    """
    number = loader.load_config.draft_model_idx
    if number is not None:
        yield from loader._filter_mtp_weights(tensors, source.prefix, number)
        return
    for name, tensor in tensors:
        yield source.prefix + name, tensor
