"""The entry point that SGLang calls in each of its processes (group `sglang.srt.plugins`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from codecllm.formats.errors import UsageError
from codecllm.serving import sglang_names
from codecllm.serving.loading import NAME, MethodFacts
from codecllm.serving.sglang_names import QuantizationConfig, QuantizeMethodBase

if TYPE_CHECKING:
    from codecllm.serving.sglang_names import LoadConfig


class CodecLLMConfig(MethodFacts, QuantizationConfig):
    """Lets SGLang accept `quant_method: codecllm` of config.json.

    `CodecLLMLoader` builds the model as that of the source, without it. Another loader would fill
    parameters with stored bytes, and is refused.
    """

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Raises an error: only another loader asks.

        Raises:
            UsageError: always.
        """
        raise UsageError("a codecllm container is read by codecllm's own loader alone", got=prefix)

    def get_scaled_act_names(self) -> list[str]:
        """Returns no activation: none is scaled."""
        return []


def choose_loader(
    original: Any, load_config: LoadConfig, model_config: Any = None, **named: Any
) -> Any:
    """Returns codecllm's loader for a container, and SGLang's choice for any other model.

    Args:
        original: SGLang's `get_model_loader`.
        load_config: what the engine was started with.
        model_config: of the model, or None.
        named: further arguments of `original`.

    Raises:
        UsageError: a container is to be read by another `--load-format` than `auto`.
    """
    if model_config is None or model_config.quantization != NAME:
        return original(load_config, model_config, **named)
    from codecllm.serving.sglang_loader import CodecLLMLoader

    if load_config.load_format != sglang_names.LoadFormat.AUTO:
        raise UsageError(
            "a codecllm container is read by --load-format auto",
            got=getattr(load_config.load_format, "value", load_config.load_format),
        )
    return CodecLLMLoader(load_config)


def register() -> None:
    """Makes containers known to SGLang; calling it again changes nothing.

    It imports neither codecllm.loader nor transformers' models: processes that hold no weights need
    neither.
    """
    sglang_names.register(CodecLLMConfig, choose_loader)
