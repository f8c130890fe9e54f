"""Every name of transformers that is not documented, in one place.

The rest of the loader knows transformers only through this module; `tests/integration/test_transformers_adapter.py` fails
loudly when one of these names moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from codecllm.formats.errors import UnsupportedEnvironmentError

QUANT_METHOD = "codecllm"


class ModulePlan(Protocol):
    """Changes the empty model before weights are loaded into it."""

    def prepare(self, model: nn.Module, prefix: str, tied: Mapping[str, str], dtype: torch.dtype) -> None:
        """Replaces modules of a model on the meta device; see `residency.ResidentInt8.prepare`."""


_plan: ContextVar[ModulePlan | None] = ContextVar("codecllm_module_plan", default=None)


class CodecLLMConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` block of a converted model's config.json."""

    def __init__(self, **block: Any) -> None:
        """Keeps every key of the block, known or not: a newer minor version may add some."""
        self.quant_method = QUANT_METHOD
        for key, value in block.items():
            if key != "quant_method":
                setattr(self, key, value)


class CodecLLMQuantizer(HfQuantizer):  # type: ignore[misc]
    """Lets the plan of the load in progress replace modules; the weights come through a decoding state dict."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses a load that did not begin in `codecllm.loader.from_pretrained`.

        Raises:
            UnsupportedEnvironmentError: transformers reads the weight files itself; it would take payloads for weights.
        """
        if _plan.get() is None:
            raise UnsupportedEnvironmentError(
                "this is a codecllm container: load it with codecllm.loader.from_pretrained(name_or_path)"
            )

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write the model: int8 modules are not what any class of transformers reads."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: codes have no gradient."""
        return False

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        plan = _plan.get()
        assert plan is not None
        plan.prepare(model, model.base_model_prefix, tied_parameters(model), dtype or model.dtype)


def register() -> None:
    """Makes `quant_method: codecllm` known to transformers; doing it again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(CodecLLMConfig)
        register_quantizer(QUANT_METHOD)(CodecLLMQuantizer)


@contextmanager
def module_plan(plan: ModulePlan) -> Iterator[None]:
    """Lets `plan` prepare the model of the `from_pretrained` call that runs inside."""
    register()
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps transformers from printing a report of missing tensors: the loader raises an error that lists them."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing its own progress bars: the caller shows progress in its own way."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_plain(folder: Path) -> Any:
    """Loads a plain model from its folder into the class that its config names, in its own dtype, on the CPU."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with silenced():
        return model_class(config).from_pretrained(folder, config=config, dtype="auto", use_safetensors=True)


def tied_parameters(model: Any) -> Mapping[str, str]:
    """Returns name of a parameter -> name of the parameter that it is tied to, for a whole model."""
    tied: Mapping[str, str] = model.all_tied_weights_keys
    return tied


def model_class(config: Any) -> Any:
    """Returns the class that `config.architectures` names, or the plain model of the config's type where it names none.

    Raises:
        UnsupportedEnvironmentError: this transformers has no such class.
    """
    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and hasattr(found, "from_pretrained"):
            return found
    if names:
        raise UnsupportedEnvironmentError(f"transformers {transformers.__version__} has no class {names[0]}")
    return transformers.AutoModel


def strip_quantization(config: Any) -> None:
    """Takes our block out of a config, so that transformers sees a plain model."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
