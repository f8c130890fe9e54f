"""The quantization config that vLLM makes for `quant_method: codecllm` of config.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from codecllm.formats.errors import UsageError
from codecllm.serving.vllm_names import (
    NAME,
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    UnquantizedLinearMethod,
)

_loading: ContextVar[bool] = ContextVar("codecllm_loading", default=False)


class CodecLLMConfig(QuantizationConfig):
    """Gives layers their methods while `CodecLLMLoader` builds a model, and refuses otherwise.

    Another loader would fill parameters with stored bytes.
    """

    def __init__(self, block: dict[str, Any]) -> None:
        """Keeps the `quantization_config` block of config.json."""
        super().__init__()
        self.block = block

    @classmethod
    def get_name(cls) -> str:
        """Returns the name of the method."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Returns the dtypes of activations: all that models are served in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the least capability of a GPU: any."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns no file: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CodecLLMConfig:
        """Returns the config for a block of config.json."""
        return cls(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Returns the method of a layer; None leaves the choice to the layer.

        Raises:
            UsageError: another loader builds the model.
        """
        if not _loading.get():
            raise UsageError(
                f"a codecllm container is read by --load-format {NAME}; for a draft model give "
                f'"draft_load_config": {{"load_format": "{NAME}"}}'
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


@contextmanager
def loading() -> Iterator[None]:
    """Lets configs give methods: `CodecLLMLoader` builds the model inside."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)
