"""`from_pretrained`: a container's name in, a working transformers model out."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    ModelMismatchError,
    NotAContainerError,
    UnsupportedEnvironmentError,
    UsageError,
    one_line,
)
from codecllm.hub import resolve
from codecllm.loader.device.codecs import Decoder
from codecllm.loader.device.engines import DeviceEngines
from codecllm.loader.device.placement import has_device, refuse_without_device, sole_device
from codecllm.loader.hf import adapter
from codecllm.loader.hf.folder import read_config, read_generation_config
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.progress import Meter, OnProgress, metered
from codecllm.loader.reader import CPU, TensorReader
from codecllm.loader.resident.residency import Residency, ResidentCompressed, ResidentInt8
from codecllm.loader.state_dict import lazy_state_dict, main_dtype, prefetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Resident = Literal["dense", "int8", "compressed"]

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_OURS = frozenset(
    {
        "config",
        "state_dict",
        "quantization_config",
        "gguf_file",
        "subfolder",
        "variant",
        "use_safetensors",
        "output_loading_info",
        "ignore_mismatched_sizes",
        "key_mapping",
        "trust_remote_code",
        "weights_only",
    }
)
"""Arguments of transformers' `from_pretrained` that a container answers itself, or that would let a wrong weight pass."""


def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    resident: Resident = "dense",
    decoder: Decoder = "auto",
    workers: int | None = None,
    expected_manifest_sha256: str | None = None,
    progress: bool | OnProgress | None = None,
    **hf_kwargs: Any,
) -> PreTrainedModel:
    """Loads a container into the transformers model that its config names, in evaluation mode.

    Every byte is compared with its checksum before it is decoded. Missing, extra or mis-shaped tensors are errors; a model is
    returned only when it is complete.

    Args:
        name_or_path: container folder or Hub id (`user/name`).
        revision: branch, tag or commit of a Hub id.
        token: Hub token.
        cache_dir: Hub cache.
        dtype: dtype of the weights, for example `torch.bfloat16` or `"bfloat16"`; None and "auto" take the source's.
        device_map: as in transformers; None loads onto the CPU.
        resident: how weights lie in memory. `dense`: as `dtype` in plain modules. `int8`: codes and scales stay, about half of
            bf16's bytes; products are those of dense or, with another kernel, within its rounding (`int8_matmul.int8_linear`).
            `compressed`: payloads stay coded as in the files and each weight is decoded just before it is used: least memory,
            the bits of dense, and the time of decoding the whole model for every forward pass.
        decoder: where chunks are decoded for a model on a GPU, with the same bits. `auto`: there, as far as it can, else on the
            CPU. `cpu`: on the CPU. `nvcomp`, `triton`: zstd by nvCOMP, `rans` by our kernel, or an error that says why not.
        workers: threads that read and decode; None takes one per core, without the native core at
            most six. For tensors that a GPU decodes no more than three read.
        expected_manifest_sha256: accept only the container with this manifest; it pins every byte.
        progress: True draws a bar on stderr, False draws none, a callback gets the tensor's name, bytes done and bytes in all;
            None leaves it to transformers' own bar.
        hf_kwargs: further arguments of transformers' `from_pretrained`, for example `attn_implementation`.

    Returns:
        The model. It has no tie to the container's files.

    Raises:
        FormatError: the container is damaged or is none.
        ModelMismatchError: its tensors are not those of the model class.
        UnsupportedEnvironmentError: this transformers or torch lacks the class or a dtype.
        HubError: the repository cannot be reached, found or read.
        UsageError: the arguments contradict each other or the container.
    """
    refused = sorted(_OURS & hf_kwargs.keys())
    if refused:
        raise UsageError(f"from_pretrained of a container takes no {', '.join(refused)}")
    if resident not in get_args(Resident):
        raise UsageError(
            "no such resident", got=repr(resident), expected=" or ".join(get_args(Resident))
        )
    if decoder not in get_args(Decoder):
        raise UsageError(
            "no such decoder", got=repr(decoder), expected=" or ".join(get_args(Decoder))
        )
    refuse_without_device(decoder, device_map)
    files = resolve(name_or_path, revision=revision, token=token, cache_dir=cache_dir, kind="model")
    pinned = expected_manifest_sha256
    with Container(files.folder, expected_manifest_sha256=pinned) as container:
        threads = decoding_threads(workers)
        config = _read_config(container, resident)
        wanted = _wanted_dtype(dtype, config, container)
        with (
            nullcontext() if progress is None else adapter.without_progress_bars(),
            metered(progress, container.manifest.source.tensor_bytes) as meter,
            DeviceEngines(container, threads, decoder) as devices,
            closing(
                _Load(
                    container,
                    threads,
                    config,
                    wanted,
                    workers,
                    meter,
                    devices,
                    device_map,
                    hf_kwargs.get("max_memory"),
                )
            ) as load,
        ):
            model = load.run(resident, {"device_map": device_map, **hf_kwargs})
        _read_generation_config(container, model)
    model.name_or_path = model.config._name_or_path = str(name_or_path)
    return model


class _Load:
    """One load in progress."""

    def __init__(
        self,
        container: Container,
        threads: int,
        config: Any,
        dtype: torch.dtype,
        workers: int | None,
        meter: Meter,
        devices: DeviceEngines,
        device_map: Any,
        max_memory: Any,
    ) -> None:
        self._container = container
        self._config = config
        self._dtype = dtype
        self._workers = workers
        self._meter = meter
        needed = container.manifest.source.tensor_bytes * max(1, dtype.itemsize // 2)
        device = sole_device(device_map, needed, max_memory)
        self._engine = devices.engine(device) if device is not None else None
        self._reader = TensorReader(container, threads, meter, devices, device or CPU)
        self._state_dict = lazy_state_dict(self._reader, container, dtype)

    def close(self) -> None:
        """Ends what is still being read."""
        self._reader.close()

    def run(self, resident: Resident, hf_kwargs: dict[str, Any]) -> PreTrainedModel:
        """Builds the model class and loads the weights; see `from_pretrained`."""
        if resident == "dense":
            prefetch(self._reader, self._state_dict)
            model = self._build(hf_kwargs)
        else:
            model = self._run_resident(self._plan(resident), hf_kwargs)
        self._check_materialized(model)
        _separate_untied(model)
        return model

    def _run_resident(self, plan: Residency, hf_kwargs: dict[str, Any]) -> PreTrainedModel:
        """Loads with replaced modules; spreads them over devices only once they are complete.

        transformers would spread, and maybe offload, the int8 parameters before they have become what they stay.
        """
        device_map = hf_kwargs.get("device_map")
        spread = adapter.spreads(device_map)
        if spread:
            spreading = {
                name: hf_kwargs[name]
                for name in ("max_memory", "offload_folder")
                if name in hf_kwargs
            }
            hf_kwargs = {
                name: value
                for name, value in hf_kwargs.items()
                if name not in ("device_map", *spreading)
            }
        with adapter.module_plan(plan):
            model = self._build(hf_kwargs)
        plan.finish(model)
        if spread:
            adapter.spread(model, device_map, **spreading)
        return model

    def _plan(self, resident: Resident) -> Residency:
        if resident == "int8":
            return ResidentInt8(self._container, self._reader, self._state_dict)
        return ResidentCompressed(
            self._container,
            self._reader,
            self._state_dict,
            self._workers,
            self._meter,
            self._engine,
        )

    def _build(self, hf_kwargs: dict[str, Any]) -> PreTrainedModel:
        cls = adapter.model_class(self._config)
        try:
            with adapter.silenced(), self._asking(hf_kwargs.get("device_map")):
                model, found = cls.from_pretrained(
                    None,
                    config=self._config,
                    state_dict=self._state_dict,
                    dtype=self._dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **hf_kwargs,
                )
        except Exception as exc:
            if self._reader.first_error is not None:
                raise self._reader.first_error from exc
            if isinstance(exc, CodecLLMError):
                raise
            raise ModelMismatchError(
                f"transformers could not build {cls.__name__}: {_one_line(exc)}"
            ) from exc
        if self._reader.first_error is not None:
            raise self._reader.first_error
        _check_loading(found, cls.__name__)
        return model

    def _asking(self, device_map: Any) -> AbstractContextManager[None]:
        """Returns how weights are asked for: from one thread, but where some go to devices for which none are made ahead."""
        if adapter.spreads(device_map) and self._engine is None and has_device():
            return nullcontext()
        return adapter.without_loading_threads()

    def _check_materialized(self, model: PreTrainedModel) -> None:
        """Refuses a model with parameters that have no weights, here or where they are offloaded to."""
        empty = [
            name
            for name, value in model.named_parameters()
            if value.is_meta and not adapter.is_offloaded(model, name)
        ]
        if empty:
            raise ModelMismatchError(
                "parameters were left without weights", tensor=empty[0], got=len(empty)
            )


def _read_config(container: Container, resident: Resident) -> Any:
    """Reads the checked config.json; our block stays in it only where modules will be replaced."""
    record = container.manifest.file(_CONFIG)
    if record is None:
        raise NotAContainerError(
            "container has no config.json: no model can be built from it",
            file=str(container.folder),
        )
    container.read_side_file(record)
    try:
        config = read_config(container.folder)
    except Exception as exc:
        raise UnsupportedEnvironmentError(
            f"transformers cannot read the config: {_one_line(exc)}", file=_CONFIG
        ) from exc
    if resident == "dense":
        adapter.strip_quantization(config)
    return config


def _read_generation_config(container: Container, model: Any) -> None:
    record = container.manifest.file(_GENERATION_CONFIG)
    if record is None or not model.can_generate():
        return
    container.read_side_file(record)
    model.generation_config = read_generation_config(container.folder)


def _wanted_dtype(
    dtype: torch.dtype | str | None, config: Any, container: Container
) -> torch.dtype:
    if dtype is None or dtype == "auto":
        dtype = getattr(config, "dtype", None) or main_dtype(container)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None) or dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(
            "not a float dtype", got=repr(dtype), expected="for example torch.bfloat16"
        )
    return dtype


def _check_loading(found: dict[str, Any], cls: str) -> None:
    """Turns transformers' report, after the class's own ignore lists, into one error.

    Raises:
        ModelMismatchError: something is missing, extra or mis-shaped.
    """
    missing, extra = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = sorted(
        f"{name} {tuple(got)} for {tuple(wanted)}" for name, got, wanted in found["mismatched_keys"]
    )
    lists = [
        ("missing", missing),
        ("not in the model", extra),
        ("mis-shaped", shapes),
        ("failed", found["error_msgs"]),
    ]
    faults = [f"{what}: {', '.join(map(str, names))}" for what, names in lists if names]
    if faults:
        raise ModelMismatchError(
            f"the container's tensors are not those of {cls}; " + "; ".join(faults)
        )


def _separate_untied(model: Any) -> None:
    """Gives parameters that are equal in the container, but not tied in the model, memory of their own."""
    seen: set[tuple[torch.device, int]] = set()
    for parameter in model.parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        place = (parameter.device, parameter.data_ptr())
        if place in seen:
            parameter.data = parameter.data.clone()
        seen.add(place)


def _one_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {one_line(exc, 300)}"
