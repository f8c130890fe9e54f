"""Every name of transformers that is not documented, in one place.

The rest of the loader knows transformers only through this module; `tests/integration/test_transformers_adapter.py` fails
loudly when one of these names moves.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError, one_line
from codecllm.formats.shards.side_tensors import SUFFIXES
from codecllm.loader.hf.folder import read_config
from codecllm.loader.hf.plain_loading import PlainLoad

try:
    from transformers.core_model_loading import ConversionOps, _IdentityOp
except ImportError:  # older than plain loading needs: the loader's own path works without them
    ConversionOps = _IdentityOp = object
try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:  # older ones fuse nothing
    revert_weight_conversion = None

QUANT_METHOD = "codecllm"
LOADS_PLAINLY = hasattr(HfQuantizer, "serialized_names")
"""Whether this transformers lets a quantizer name its stored tensors and decode them: 5.21 and newer."""


class ModulePlan(Protocol):
    """Changes the empty model before weights are loaded into it.

    Attributes:
        modules: names of the modules that it replaced.
    """

    modules: list[str]

    def prepare(
        self, model: nn.Module, prefix: str, tied: dict[str, str], dtype: torch.dtype
    ) -> None:
        """Replaces modules of a model on the meta device; see `residency.Residency.prepare`."""


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
    """Loads a container where transformers asks for it.

    Inside `codecllm.loader.from_pretrained` it lets the plan of that load replace modules; the weights come through a decoding
    state dict. Anywhere else transformers reads the shards itself, and every parameter is decoded to a plain, dense one: the
    result is a plain model without a quantizer.
    """

    requires_calibration = True

    def __init__(self, quantization_config: CodecLLMConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._plan = _plan.get()
        self._load: PlainLoad | None = None
        self._model: weakref.ref[Any] | None = None
        quantization_config.dequantize = self._plan is None

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """Name of a parameter -> names of the stored tensors that make it."""
        names = self._load.parameter_names if self._load is not None else []
        return {name: [name, *(name + suffix for suffix in SUFFIXES)] for name in names}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what this transformers cannot do by itself.

        Raises:
            UnsupportedEnvironmentError: it is too old to ask a quantizer for the names of stored tensors.
        """
        if self._plan is None and not LOADS_PLAINLY:
            raise UnsupportedEnvironmentError(
                f"transformers {transformers.__version__} cannot load a codecllm container by itself (5.21 and newer can): "
                "use codecllm.loader.from_pretrained(name_or_path)"
            )

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Keeps transformers from rounding stored tensors, scales among them, before they are decoded."""
        if any(
            isinstance(operation, DecodeOperation)
            for operation in getattr(converter, "operations", ())
        ):
            return None
        wanted: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return wanted

    def get_load_operations(self) -> dict[str, Any]:
        """Returns the operation that transformers runs on the stored tensors of each parameter."""
        return {} if self._plan is not None else {"dequantize": DecodeOperation}

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write the model: coded modules are not what any class of transformers reads.

        Raises:
            UsageError: the model itself is to be written, not adapters on top of it.
        """
        model = self._model() if self._model is not None else None
        if model is not None and not getattr(model, "_hf_peft_config_loaded", False):
            raise UsageError(
                "save_pretrained cannot write a model whose weights stay coded in memory: copy the container's folder, or load "
                "it with resident='dense', save that, and run `codecllm convert` on it"
            )
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on top of the model can be trained: gradients pass through it, codes have none."""
        return True

    def decode(self, collected: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """See `plain_loading.PlainLoad.decode`."""
        assert self._load is not None
        return self._load.decode(collected, dtype)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._plan is not None:
            self._plan.prepare(
                model, model.base_model_prefix, tied_parameters(model), dtype or model.dtype
            )
            for name in (
                self._plan.modules
            ):  # else transformers decodes their weights to fill them with random numbers
                model.get_submodule(name)._is_hf_initialized = True
        else:
            self._load = PlainLoad(checkpoint_files or [])
            weakref.finalize(self, self._load.close)  # where the load fails midway
            self._load.expect(dtype or model.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._load is not None:
            try:
                self._load.fill_aliases(model, tied_parameters(model))
            finally:
                self._load.close()
            # What saving would run backwards: without ours, transformers takes the model's own conversions again.
            if hasattr(model, "_weight_conversions"):
                del model._weight_conversions
        self._plan = self._load = None  # the model keeps its quantizer
        self._model = weakref.ref(model)
        return model


class DecodeOperation(ConversionOps):  # type: ignore[misc]
    """Decodes the stored tensors that transformers collected for a parameter."""

    def __init__(self, hf_quantizer: CodecLLMQuantizer) -> None:
        self._quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeOperation:
        """Returns itself: transformers copies operations per parameter, and open files cannot be copied."""
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the patterns of `input_dict` without their companions, decoded to the parameter's dtype."""
        value = model.state_dict(keep_vars=True).get(full_layer_name) if model is not None else None
        decoded = self._quantizer.decode(
            input_dict, value.dtype if value is not None else torch.float32
        )
        if len(decoded) == 1 and not any("*" in pattern for pattern in decoded):
            (only,) = decoded.values()
            return {full_layer_name: only[0] if isinstance(only, list) and len(only) == 1 else only}
        return decoded

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving writes dense weights as they are."""
        return _IdentityOp()


def register() -> None:
    """Makes `quant_method: codecllm` known to transformers; doing it again changes nothing."""
    if AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD) is not CodecLLMQuantizer:
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(
            QUANT_METHOD, None
        )  # of this module before it was reloaded
        AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
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


_SEQUENTIAL_LOAD = "HF_DEACTIVATE_ASYNC_LOAD"
_sequential_loads: list[str | None] = []
_sequential_lock = threading.Lock()


@contextmanager
def without_loading_threads() -> Iterator[None]:
    """Lets `from_pretrained` calls that run inside ask for each weight in the calling thread.

    transformers asks in four threads of its own otherwise, each of which waits for the engine and
    takes the interpreter's lock from it: a fifth of a load. The switch is an environment variable,
    so plain loads that run at the same moment in other threads go without theirs too.
    """
    with _sequential_lock:
        _sequential_loads.append(os.environ.get(_SEQUENTIAL_LOAD))
        os.environ[_SEQUENTIAL_LOAD] = "1"
    try:
        yield
    finally:
        with _sequential_lock:
            # Loads may overlap: the first one saw the caller's value, the last one brings it back.
            callers_value = _sequential_loads[0]
            _sequential_loads.pop()
            if not _sequential_loads:
                os.environ.pop(_SEQUENTIAL_LOAD)
                if callers_value is not None:
                    os.environ[_SEQUENTIAL_LOAD] = callers_value


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


def load_plain(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """Loads a plain model from its folder into the class that its config names, on the CPU; "auto" keeps its own dtype."""
    config = read_config(folder)
    with silenced():
        return model_class(config).from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True
        )


def load_offloaded(folder: Path, offload_folder: Path, memory_bytes: int) -> Any:
    """Loads a plain model as `load_plain` does, what passes `memory_bytes` left on disk: blocks are read when they run."""
    config = read_config(folder)
    with silenced():
        return model_class(config).from_pretrained(
            folder,
            config=config,
            dtype="auto",
            use_safetensors=True,
            device_map="auto",
            max_memory={"cpu": memory_bytes},
            offload_folder=offload_folder,
        )


def as_saved(model: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns values of parameters under the names, and cut into the tensors, that the model's checkpoint has."""
    return (
        dict(revert_weight_conversion(model, values))
        if revert_weight_conversion is not None
        else values
    )


def load_gguf(path: Path, dtype: torch.dtype) -> Any:
    """Loads a GGUF file into the class that its metadata name, every tensor dequantized to `dtype`."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    reader.tqdm = lambda tensors, **_: tensors  # its progress bar knows no switch
    try:
        with silenced():
            return transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, trust_remote_code=False
            )
    finally:
        reader.tqdm = bar


def spreads(device_map: Any) -> bool:
    """Whether a device map may put a model onto more than one place."""
    if isinstance(device_map, str):
        return device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    return isinstance(device_map, dict) and len(set(device_map.values())) > 1


def spread(model: Any, device_map: Any, max_memory: Any = None, offload_folder: Any = None) -> None:
    """Spreads a complete model on the CPU over devices, as transformers does while it loads one; buffers are offloaded too."""
    if isinstance(device_map, str):
        whole = {
            "max_memory": max_memory,
            "no_split_module_classes": list(model._no_split_modules or []),
        }
        if device_map != "sequential":
            whole["max_memory"] = get_balanced_memory(
                model, low_zero=device_map == "balanced_low_0", **whole
            )
        device_map = infer_auto_device_map(model, **whole)
    dispatch_model(model, device_map=device_map, offload_dir=offload_folder, offload_buffers=True)


def is_offloaded(model: Any, name: str) -> bool:
    """Whether a parameter's weights lie elsewhere, on the CPU or the disk, until its module, or one around that, runs."""
    own = name = name.rpartition(".")[0]
    while True:
        hook: Any = getattr(model.get_submodule(name), "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            offloads = getattr(one, "offload", False) and one.weights_map is not None
            if offloads and (name == own or one.place_submodules):
                return True
        if not name:
            return False
        name = name.rpartition(".")[0]


def linear_modules(folder: Path) -> list[str]:
    """Returns the names of the nn.Linear modules of the model that a folder's config names; no weights are read or made.

    Raises:
        UnsupportedEnvironmentError: this transformers cannot read the config, or has no such class.
    """
    try:
        config = read_config(folder)
    except Exception as exc:
        reason = one_line(exc)
        raise UnsupportedEnvironmentError(
            f"transformers cannot read the config: {reason}", file="config.json"
        ) from exc
    strip_quantization(config)
    with torch.device("meta"):
        model = model_class(config)(config)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def tied_parameters(model: Any) -> dict[str, str]:
    """Returns the model's own table: name of a parameter -> name of the parameter that it is tied to."""
    tied: dict[str, str] = model.all_tied_weights_keys
    return tied


def model_class(config: Any) -> Any:
    """Returns the class that `config.architectures` names, or the plain model of the config's type where it names none.

    Raises:
        UnsupportedEnvironmentError: this transformers has no such class.
    """
    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        found = getattr(transformers, name, None)
        # Not one of transformers' Auto classes: these look up code of the folder.
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if names:
        raise UnsupportedEnvironmentError(
            f"transformers {transformers.__version__} has no class {names[0]}"
        )
    return transformers.AutoModel


def strip_quantization(config: Any) -> None:
    """Takes our block out of a config, so that transformers sees a plain model."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
