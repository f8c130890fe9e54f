"""The quantizer that transformers finds for `quant_method: codecllm`.

It is how a container is loaded, by `codecllm.from_pretrained` and by transformers' own classes: one
path, in which transformers reads the config, builds the class, renames, converts, ties and reports
as it does for the source, and gets the weights from a state dict that decodes itself.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from codecllm.formats.errors import (
    LayoutError,
    NotAContainerError,
    UnsafePathError,
    UsageError,
    shown,
)
from codecllm.formats.manifest.manifest import (
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    ORIGINAL_KEY,
    QUANT_METHOD,
)
from codecllm.formats.shards.index import check_index
from codecllm.hub import resolve
from codecllm.loader.config_size import check_config_of
from codecllm.loader.hf import hooks
from codecllm.loader.hf.remote_code import forget_code_of_parts
from codecllm.loader.hf.side_limits import check_config_document, refuse_kernels_of
from codecllm.loader.load import Load, LoadOptions
from codecllm.loader.resident.coded_weight import CodedWeight, make_plain
from codecllm.loader.residents import Chosen

QUANTIZED_MARK = "_is_quantized"
"""The attribute of a config by which classes of transformers see that weights are quantized."""

_current_load: ContextVar[Load | None] = ContextVar("codecllm_load", default=None)


class CodecLLMConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` block of a converted model's config.json."""

    def __init__(self, **block: Any) -> None:
        """Keeps every key of the block, known or not: a newer minor version may add some."""
        self.quant_method = QUANT_METHOD
        for key, value in block.items():
            if key != "quant_method":
                setattr(self, key, value)


class CodecLLMQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives transformers the weights of a container; see `hooks.WeightSource` for the steps.

    Inside `codecllm.from_pretrained` the load is the one that this function has opened. Where
    transformers was called directly the quantizer opens the container itself, and every parameter
    is loaded dense: the result is a plain model without a quantizer.
    """

    requires_calibration = True

    def __init__(self, quantization_config: CodecLLMConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._load = _current_load.get()
        self._opened_here = self._load is None
        self._device_map: Any = None
        self._is_finished = False
        quantization_config.dequantize = self._load is None or self._load.is_dense

    @classmethod
    def give_back(cls, config: Any) -> CodecLLMQuantizer | None:
        """See `hooks.WeightSource`."""
        entries = _entries(config)
        if entries.get("quant_method") != QUANT_METHOD:
            return None
        original = entries.get(ORIGINAL_KEY)
        text = config.get_text_config(decoder=True)
        # The text config of an encoder and decoder is a copy of the whole, our block included.
        is_nested = _entries(text).get("quant_method") not in (None, QUANT_METHOD)
        if original is not None:
            config.quantization_config = original
        elif is_nested:
            del config.quantization_config
        else:
            return None
        return cls(CodecLLMConfig(**entries), pre_quantized=True)

    @classmethod
    def block_of_part(cls, block: Any, own: Any) -> dict[str, Any] | None:
        """See `hooks.WeightSource`."""
        if not isinstance(block, dict) or block.get("quant_method") != QUANT_METHOD:
            return None
        return block if own is None else {**block, ORIGINAL_KEY: own}

    @classmethod
    def check_config(cls, whole: dict[str, Any], chosen: dict[str, Any]) -> None:
        """See `hooks.WeightSource`.

        Raises:
            ModelMismatchError, LimitError: it asks for more modules or labels than any model has.
            UnsafePathError: it names attention or experts of a repository.
        """
        block = whole.get("quantization_config")
        if isinstance(block, dict) and block.get("quant_method") == QUANT_METHOD:
            forget_code_of_parts(whole)
            check_config_document({**whole, **chosen})
            refuse_kernels_of(whole, chosen)

    def finish(self, model: Any) -> None:
        """See `hooks.WeightSource`."""
        try:
            self._active.finish(model)
        finally:
            if self._opened_here:
                self._active.close()
            self._load = None  # the model keeps its quantizer
            self._is_finished = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Remembers the device map that the caller asked for."""
        self._device_map = device_map

    def dtypes(
        self, checkpoint_files: list[str], config: Any, index: dict[str, Any] | None
    ) -> dict[str, torch.Tensor]:
        """See `hooks.WeightSource`; opens the container and compares the config's size with it.

        Raises:
            UnsafePathError: config or index lead to weight files of another folder.
            NotAContainerError: there is no manifest beside the weight files.
            FormatError: the container is damaged.
            ModelMismatchError: the config describes far more layers than the container can fill.
        """
        file_names = _named_files(config, index)
        if self._load is None:
            folder = _container_folder(checkpoint_files)
            self._load = Load(folder, LoadOptions(device_map=self._device_map))
            weakref.finalize(self, self._load.close)  # where the load fails midway
            for shard in self._load.container.manifest.shards:
                self._load.container.check_presence(shard)  # before transformers opens them
            check_index(self._load.container)
            shards = {shard.name for shard in self._load.container.manifest.shards}
            if not file_names <= shards:  # an index that is not listed
                raise LayoutError(
                    "the index names no shard of the container",
                    file=INDEX_NAME,
                    got=shown(min(file_names - shards)),
                )
        # Here, because the caller may have changed it, or brought one.
        check_config_of(self._load.container, config.to_dict())
        return self._load.dtypes()

    @property
    def is_finished(self) -> bool:
        """See `hooks.WeightSource`."""
        return self._is_finished

    def begin(self, dtype: torch.dtype) -> None:
        """See `hooks.WeightSource`."""
        self._active.start(dtype)

    def state_dict(self, model: Any) -> dict[str, Any]:
        """See `hooks.WeightSource`."""
        return dict(self._active.state_dict(model))

    def asks_in_calling_thread(self) -> bool:
        """See `hooks.WeightSource`."""
        return self._active.asks_in_calling_thread()

    def loaded(self, loading_info: Any) -> None:
        """See `hooks.WeightSource`."""
        self._active.loaded(loading_info)
        if self._active.first_error is not None:
            raise self._active.first_error

    def is_serializable(self) -> bool:
        """False: no class of transformers reads codes."""
        return False

    @classmethod
    def check_saving(cls, model: Any) -> None:
        """See `hooks.WeightSource`.

        Raises:
            UsageError: the model, or a part of it, stays coded in memory, and it is to be written
                itself, not adapters on top of it.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return
        configs = [getattr(part, "config", None) for part in model.modules()]
        ours = [part for part in configs if _entries(part).get("quant_method") == QUANT_METHOD]
        if ours and any(isinstance(value, CodedWeight) for value in model.parameters()):
            raise UsageError(
                "save_pretrained cannot write a model whose weights stay coded in memory: copy the "
                "container's folder, or call model.dequantize(), save that, and run "
                "`codecllm convert` on it"
            )
        if not isinstance(getattr(model, "hf_quantizer", None), cls):
            # Weights are plain: the config is a copy, which an encoder has, or of a container's.
            for config in ours:
                vars(config).pop("quantization_config", None)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Makes every weight of a model plain; from then on it is one that was loaded dense.

        Args:
            model: the model; it is changed.
            dtype: the model is cast to it first; None leaves each weight in its own.

        Returns:
            The model.
        """
        if dtype is not None:
            model.to(dtype)
        make_plain(model)
        self.remove_quantization_config(model)
        model.codecllm_resident = Chosen("dense", "the caller called dequantize")
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_load": None}

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on top of the model can be trained: gradients pass, codes have none."""
        return True

    @property
    def _active(self) -> Load:
        assert self._load is not None, "transformers has asked for no dtype"
        return self._load

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Nothing: modules are replaced once transformers has decided on names and dtypes."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.finish(model)
        # By this mark some classes (Jamba, Falcon Mamba) compute without their weights' values,
        # which a module in codes may not have. Ours have them: the dense path, bit for bit.
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                vars(part.config).pop(QUANTIZED_MARK, None)
        return model


@contextmanager
def using(load: Load) -> Iterator[None]:
    """Lets the `from_pretrained` call that runs inside take its weights from `load`."""
    register()
    token = _current_load.set(load)
    try:
        yield
    finally:
        _current_load.reset(token)


def register() -> None:
    """Makes `quant_method: codecllm` known to transformers; doing it again changes nothing."""
    if AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD) is not CodecLLMQuantizer:
        # They may be there from before this module was reloaded.
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
        AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
        register_quantization_config(QUANT_METHOD)(CodecLLMConfig)
        register_quantizer(QUANT_METHOD)(CodecLLMQuantizer)
        hooks.install(CodecLLMQuantizer)


def _entries(config: Any) -> dict[str, Any]:
    """Returns the quantization block of a config, empty where it has none."""
    block = getattr(config, "quantization_config", None)
    entries: dict[str, Any] = block if isinstance(block, dict) else getattr(block, "__dict__", {})
    return entries


def _named_files(config: Any, index: dict[str, Any] | None) -> set[str]:
    """Returns the names of the weight files in an index, empty where there is none.

    Raises:
        UnsafePathError: it, or the config, leads to another folder, whose container would be loaded
            in place of this one.
    """
    if getattr(config, "transformers_weights", None) is not None:
        raise UnsafePathError(
            "transformers_weights leads to other files than the container's", file=CONFIG_NAME
        )
    names = set(index["weight_map"].values()) if index is not None else set()
    for name in names:
        if name != os.path.basename(name):
            raise UnsafePathError(
                "weight_map names a file of another folder", file=INDEX_NAME, got=shown(name)
            )
    return names


def _container_folder(checkpoint_files: list[str]) -> Path:
    """Finds the container of weight files; fetches its manifest where transformers has not."""
    if not checkpoint_files:
        raise NotAContainerError("transformers found no weight files")
    folder = Path(checkpoint_files[0]).parent
    if not (folder / MANIFEST_NAME).exists():
        files = resolve(folder)
        if files.repo is not None:
            cache = folder.resolve().parents[2]
            return resolve(files.repo, revision=files.commit, cache_dir=cache, kind="model").folder
        raise NotAContainerError(
            f"config.json names codecllm, but {MANIFEST_NAME} is missing: restore it, or where the "
            "weights are plain ones take quantization_config out of config.json",
            file=str(folder),
        )
    return folder
