"""Every name of vLLM that codecllm uses: no other file imports vLLM.

Public, and private where the comment says so. `tests/serving/test_vllm_names.py` fails where one of
them moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.config.utils import replace
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    FusedMoeWeightScaleSupported,
    MoEActivation,
    RoutedExperts,
    apply_moe_activation,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.weight_utils import enable_tqdm
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
from vllm.platforms import current_platform

from codecllm.serving.loading import NAME

__all__ = [
    "DefaultModelLoader",
    "FusedMoEMethodBase",
    "LinearBase",
    "LinearMethodBase",
    "LoadConfig",
    "ModelConfig",
    "ParallelLMHead",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "VocabParallelEmbedding",
    "enable_tqdm",
    "init_logger",
    "register_weight_loader_v2_supported_method",
    "replace",
]

_MARK = "_codecllm_original"


def register(config: type[QuantizationConfig], loader: type[DefaultModelLoader]) -> None:
    """Registers both classes, and lets `--load-format auto` choose the loader for containers."""
    if NAME not in QUANTIZATION_METHODS or get_quantization_config(NAME) is not config:
        register_quantization_config(NAME)(config)
    try:
        known = isinstance(get_model_loader(LoadConfig(load_format=NAME)), loader)
    except ValueError:  # "Load format `codecllm` is not supported"
        known = False
    if not known:
        register_model_loader(NAME)(loader)
    _choose_loader()


def _choose_loader() -> None:
    """Wraps `EngineArgs.create_model_config`, private: vLLM's own plug-ins (bnb, gguf) do so too.

    vLLM knows the quantization method only then, and makes the load config right afterwards.
    """
    original = EngineArgs.create_model_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_model_config(self: EngineArgs, *arguments: Any, **named: Any) -> ModelConfig:
        config = original(self, *arguments, **named)
        if config.quantization == NAME and self.load_format == "auto":
            self.load_format = NAME
        return config

    setattr(create_model_config, _MARK, original)
    EngineArgs.create_model_config = create_model_config


def add_hash_factor(vllm_config: VllmConfig, key: str, value: str) -> None:
    """Makes `value` a part of the key of vLLM's compile cache.

    `LoadConfig` has no part in that key, and two containers may lie under one path.
    """
    factors = vllm_config.additional_config or {}
    if isinstance(factors, dict):  # a platform may put an object there
        vllm_config.additional_config = {**factors, key: value}


def new_name_of(mapper: Any) -> Callable[[str], str | None]:
    """Returns how a model renames a name of the checkpoint; None: it ignores the name.

    vLLM 0.26 has a private method for it.
    """
    new_name: Callable[[str], str | None] = getattr(mapper, "map_name", None) or mapper._map_name
    return new_name


def is_elsewhere(loader: DefaultModelLoader, name: str) -> bool:
    """Whether a weight belongs to an expert that another rank holds (private attribute)."""
    return bool(should_skip_weight(name, loader.local_expert_ids))


def secondary_weights(
    loader: DefaultModelLoader, model: torch.nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of a model that lie in other repositories (private method)."""
    for source in getattr(model, "secondary_weights", ()):
        yield from loader._get_weights_iterator(source)


def parameter_by_rows(
    data: torch.Tensor, load: Callable[..., Any], *, is_linear: bool
) -> torch.nn.Parameter:
    """Returns a parameter that vLLM's loaders fuse, cut by ranks and pad.

    Args:
        data: a matrix [rows, columns], or scales of rows, [rows].
        load: its loader.
        is_linear: whether a linear layer or an embedding gets it.
    """
    parameter: torch.nn.Parameter
    if not is_linear:
        parameter = torch.nn.Parameter(data, requires_grad=False)
        parameter.output_dim, parameter.weight_loader = 0, load  # type: ignore[attr-defined]
    elif data.dim() == 1:
        parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=load)
    else:
        parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=load)
    return parameter


PER_CHANNEL = FusedMoeWeightScaleSupported.CHANNEL.value
"""Kind of scales of experts, for vLLM's loader of them."""

_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


def is_plain_experts(layer: RoutedExperts) -> bool:
    """Whether a layer of experts is what `vllm_experts` computes.

    Each expert is `down(act(gate) * up)`, without biases and limits; experts are not doubled or
    moved while the engine runs, tokens are not sent between ranks, and adapters change no expert.
    """
    config = layer.moe_config
    parallel = config.moe_parallel_config
    limits = (config.swiglu_limit, config.swiglu_alpha, config.swiglu_beta)
    return bool(
        config.is_act_and_mul
        and config.activation in _ACTIVATIONS
        and not config.has_bias
        and all(limit is None for limit in limits)
        and config.num_experts == config.num_logical_experts
        and not (parallel.enable_eplb or parallel.dp_size > 1 or config.is_lora_enabled)
        and not layer.apply_router_weight_on_input
    )


def platform_device() -> torch.device:
    """Returns the kind of device that vLLM runs on."""
    return torch.device(current_platform.device_type)


def local_number(layer: RoutedExperts, number: int) -> int:
    """Returns the place of an expert on this rank; -1: another one holds it (private method)."""
    return int(layer._map_global_expert_id_to_local_expert_id(number))


def local_experts(layer: RoutedExperts) -> list[int]:
    """Returns the numbers of the experts that this rank holds."""
    return [
        number for number in range(layer.global_num_experts) if local_number(layer, number) >= 0
    ]


def activate(activation: MoEActivation, both: torch.Tensor) -> torch.Tensor:
    """Returns `act(gate) * up`, [tokens, n], for gates and ups [tokens, 2 n]."""
    result = both.new_empty(len(both), both.shape[1] // 2)
    apply_moe_activation(activation, result, both)
    return result


def prepare_cpu(device: torch.device) -> None:
    """Lets this process use the matrix units of its CPU (private function of torch).

    vLLM's attention on a CPU uses them and relies on a product of bfloat16 matrices having asked
    for them before. Where all matrices are codes there is none, and the process would be killed.
    """
    if device.type == "cpu":
        torch.cpu._init_amx()
