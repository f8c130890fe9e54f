"""Every private name of transformers that a container's load passes through, in one place.

Some steps of `PreTrainedModel.from_pretrained` are wrapped, once per process:

- the choice of the quantizer: where the source was quantized by another library, that library's
  quantizer is chosen as for the source, and runs on decoded tensors;
- the choice of the dtype, which reads weights where the config names none, then reads the dtypes
  of the source instead of those of coded bytes;
- the loading of the weights then takes a state dict that decodes itself, under the source's own
  names. Everything that follows from names is left to transformers: conversions and renames,
  fused experts, prefixes, tied weights, modules that stay in float32;
- the reading of a config by a class that takes a part of it (`CLIPTextModel` of a CLIP folder)
  keeps our block, which stands at the top; a config with our block is checked before its class,
  which may make a million labels, is made;
- the building and the finishing of a model hold one lock. transformers changes the default dtype
  and its own `tie_weights` for that time, for all threads: without the lock a load in another
  thread gets weights of a wrong dtype, or loses a tie.

A model that is no container passes through unchanged, apart from the lock.
`tests/integration/test_transformers_hooks.py` fails when one of the names moves.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import wraps
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, core_model_loading, modeling_utils
from transformers.modeling_utils import PreTrainedModel

from codecllm.formats.machine import without_garbage_collection
from codecllm.hub import no_requests

_building = threading.RLock()
"""Held while transformers builds or finishes a model, by whichever class."""
# A fork waits for the building in other threads: in the child nobody would end it, and the default
# dtype would stay that of their models.
os.register_at_fork(
    before=_building.acquire,
    after_in_parent=_building.release,
    after_in_child=_building.release,
)

_ORIGINAL = "_codecllm_original"


class WeightSource(Protocol):
    """The quantizer of a container, as the wrapped steps see it."""

    @classmethod
    def give_back(cls, config: Any) -> WeightSource | None:
        """Puts the source's own quantization back into a config, in place of ours.

        Returns:
            The source of the weights while the source's quantizer runs; None, and nothing is
            changed, where the config has no block of ours or the source was not quantized.
        """

    @classmethod
    def block_of_part(cls, block: Any, own: Any) -> dict[str, Any] | None:
        """Returns the quantization block of a part of a config.

        Args:
            block: the whole config's block, or None.
            own: that of the part, or None.

        Returns:
            The block; None where `block` is not ours, and the part is as it was.
        """

    @classmethod
    def check_config(cls, whole: dict[str, Any], chosen: dict[str, Any]) -> None:
        """Refuses a config before its class is made, where it asks for too much; parts lose code.

        Args:
            whole: the JSON object of a config.json; nothing is done where it has no block of ours.
            chosen: arguments of the caller, which replace entries of it.
        """

    @classmethod
    def check_saving(cls, model: Any) -> None:
        """Refuses to write weights in codes; takes our block out of configs of plain weights."""

    def dtypes(
        self, checkpoint_files: list[str], config: Any, index: dict[str, Any] | None
    ) -> dict[str, torch.Tensor]:
        """Returns an empty tensor for each tensor of the source, in its dtype.

        Args:
            checkpoint_files: paths that transformers has found and not opened yet.
            config: the model's.
            index: what the index of weights says, None where there is none.
        """

    @property
    def is_finished(self) -> bool:
        """Whether the model has its weights: what is loaded now is an adapter on top of it."""

    def begin(self, dtype: torch.dtype) -> None:
        """Receives the dtype that transformers has chosen for the model."""

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Returns the weights to load: name in the source -> tensor that decodes itself."""

    def asks_in_calling_thread(self) -> bool:
        """Whether the thread that loads asks for each weight itself."""

    def loaded(self, loading_info: Any) -> None:
        """Receives the report of the load, which transformers completes afterwards in place."""

    def finish(self, model: Any) -> None:
        """Checks and completes a model that the source's quantizer has completed."""


class _AskInCallingThread:
    """A quantizer that does nothing, and under which transformers uses no threads for weights.

    Its four threads would each wait for a decoding thread and take the interpreter's lock from it:
    a fifth of a load.
    """

    pre_quantized = False

    def param_needs_quantization(self, model: Any, name: str, **kwargs: Any) -> bool:
        """No parameter is quantized while it is loaded."""
        return False


def tied_parameters(model: Any) -> dict[str, str]:
    """Returns the model's own table: name of a parameter -> name of the one that it is tied to.

    Changing the table changes the ties that transformers makes at the end of a load.
    """
    table: dict[str, str] = model.all_tied_weights_keys
    return table


def as_saved(model: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns values of parameters under the names, and cut into the tensors, of a checkpoint."""
    return dict(core_model_loading.revert_weight_conversion(model, values))


def building() -> AbstractContextManager[Any]:
    """Returns the lock that the building of a model holds; a thread may take it again."""
    return _building


def install(weight_source: type[Any]) -> None:
    """Wraps the steps of transformers; doing it again changes nothing.

    Args:
        weight_source: class of the quantizers whose loads take another path, a `WeightSource`.
    """
    _wrap(modeling_utils, "get_hf_quantizer", _get_hf_quantizer, weight_source)
    _wrap(modeling_utils, "_get_dtype", _get_dtype, weight_source)
    _wrap(
        modeling_utils,
        "convert_and_load_state_dict_in_model",
        _load_state_dict,
        weight_source,
    )
    if not hasattr(PreTrainedConfig, _ORIGINAL):
        read = PreTrainedConfig.get_config_dict
        setattr(PreTrainedConfig, _ORIGINAL, read)
        PreTrainedConfig.get_config_dict = _with_block_of_parts(read, weight_source)
        PreTrainedConfig.from_dict = _without_requests(PreTrainedConfig.from_dict, weight_source)
    if not hasattr(PreTrainedModel, "_codecllm_locked"):
        PreTrainedModel._codecllm_locked = True
        PreTrainedModel.get_init_context = _locked_init_context(PreTrainedModel.get_init_context)
        finish = _locked(PreTrainedModel._finalize_model_loading)
        PreTrainedModel._finalize_model_loading = staticmethod(finish)
        PreTrainedModel.save_pretrained = _checked(PreTrainedModel.save_pretrained, weight_source)


def _checked(save: Callable[..., Any], weight_source: type[Any]) -> Callable[..., Any]:
    @wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight_source.check_saving(self)
        return save(self, *args, **kwargs)

    return save_pretrained


def _wrap(module: Any, name: str, wrapper: Callable[..., Any], weight_source: type[Any]) -> None:
    current = getattr(module, name)
    original = getattr(current, _ORIGINAL, current)  # this module may have been reloaded

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, weight_source, *args, **kwargs)

    setattr(wrapped, _ORIGINAL, original)
    setattr(module, name, wrapped)


_sources: weakref.WeakKeyDictionary[Any, WeightSource] = weakref.WeakKeyDictionary()
"""A quantizer of another library -> the source of the weights of the container that it loads."""


def _source_of(quantizer: Any, weight_source: type[Any]) -> WeightSource | None:
    """Returns the source of the weights of a load, or None where no container is loaded."""
    if isinstance(quantizer, weight_source):
        source: WeightSource = quantizer
        return source
    return _sources.get(quantizer) if quantizer is not None else None


def _get_hf_quantizer(
    original: Callable[..., Any],
    weight_source: type[Any],
    config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    source = weight_source.give_back(config)
    result = original(config, *args, **kwargs)
    quantizer = result[0]
    if source is not None and quantizer is not None:
        _sources[quantizer] = source
        _finish_with(quantizer, source)
    return result


def _finish_with(quantizer: Any, source: WeightSource) -> None:
    """Lets `source` finish the model once `quantizer` has; the quantizer then is as it was."""
    usual = quantizer.postprocess_model

    @wraps(usual)
    def postprocess_model(model: Any, **kwargs: Any) -> Any:
        # The quantizer stays with the model, and must not keep this wrapper and the container.
        del quantizer.postprocess_model
        result = usual(model, **kwargs)
        source.finish(model)
        _sources.pop(quantizer, None)
        return result

    quantizer.postprocess_model = postprocess_model


def _get_dtype(
    original: Callable[..., Any],
    weight_source: type[Any],
    dtype: Any,
    checkpoint_files: list[str] | None,
    config: Any,
    sharded_metadata: dict[str, Any] | None,
    state_dict: dict[str, Any] | None,
    weights_only: bool,
    hf_quantizer: Any = None,
) -> Any:
    source = _source_of(hf_quantizer, weight_source)
    if source is None:
        # By position: so fewer private names must stay as they are.
        rest = (sharded_metadata, state_dict, weights_only, hf_quantizer)
        return original(dtype, checkpoint_files, config, *rest)
    with without_garbage_collection():
        dtypes = source.dtypes(checkpoint_files or [], config, sharded_metadata)
        config, model_dtype = original(
            dtype, checkpoint_files, config, None, dtypes, weights_only, hf_quantizer
        )
        source.begin(model_dtype)
    return config, model_dtype


def _load_state_dict(
    original: Callable[..., Any],
    weight_source: type[Any],
    model: Any,
    state_dict: dict[str, Any],
    load_config: Any,
    disk_offload_index: dict[str, Any] | None = None,
) -> Any:
    source = _source_of(load_config.hf_quantizer, weight_source)
    if source is None:
        return original(model, state_dict, load_config, disk_offload_index)
    if source.is_finished:
        plain_config = replace(load_config, hf_quantizer=None)
        return original(model, state_dict, plain_config, disk_offload_index)
    weights = source.state_dict(model)
    # Not ours: these weights decode themselves and need no operation of a quantizer.
    stand_in = _AskInCallingThread() if source.asks_in_calling_thread() else None
    if not isinstance(load_config.hf_quantizer, weight_source):
        stand_in = load_config.hf_quantizer
    if disk_offload_index is not None:
        # transformers has listed coded bytes there, as if they were weights.
        disk_offload_index = {}
    with without_garbage_collection():
        info, index = original(
            model, weights, replace(load_config, hf_quantizer=stand_in), disk_offload_index
        )
    if index is not None:
        # transformers has made these entries in the list that ours replaced.
        for name, target in tied_parameters(model).items():
            if target in index:
                index.setdefault(name, index[target])
    source.loaded(info)
    return info, index


def _with_block_of_parts(original: Any, weight_source: type[Any]) -> Any:
    function = original.__func__

    @wraps(function)
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        whole, options = function(cls, *args, **kwargs)
        weight_source.check_config(whole, kwargs)
        for part in _parts_for(cls, whole):
            block = weight_source.block_of_part(
                whole.get("quantization_config"), part.get("quantization_config")
            )
            if block is not None:
                part["quantization_config"] = block
        return whole, options

    return classmethod(get_config_dict)


def _without_requests(original: Any, weight_source: type[Any]) -> Any:
    function = original.__func__

    @wraps(function)
    def from_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config_dict = args[0] if args else kwargs.get("config_dict")
        block = config_dict.get("quantization_config") if isinstance(config_dict, dict) else None
        is_own_class = cls.__module__.partition(".")[0] == "transformers"
        if not is_own_class or weight_source.block_of_part(block, None) is None:
            return function(cls, *args, **kwargs)
        with no_requests("the class of this config"):
            return function(cls, *args, **kwargs)

    return classmethod(from_dict)


def _parts_for(config_class: Any, whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the parts of a config that `from_pretrained` of a config class may take."""
    part = whole.get(config_class.base_config_key)
    if isinstance(part, dict):
        return [part]
    kind = config_class.model_type
    if not kind or whole.get("model_type") == kind:
        return []
    parts = [value for value in whole.values() if isinstance(value, dict)]
    return [value for value in parts if value.get("model_type") == kind]


def _locked(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with _building:
            return function(*args, **kwargs)

    return locked


def _locked_init_context(original: Any) -> Any:
    function = original.__func__

    @wraps(function)
    def get_init_context(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return [_building, *function(cls, *args, **kwargs)]

    return classmethod(get_init_context)
