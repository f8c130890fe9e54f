"""`from_pretrained`: a container's name in, a working transformers model out."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from codecllm.formats.arguments.check import check_arguments, choice, refusal
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    ModelMismatchError,
    NotAContainerError,
    UnsupportedEnvironmentError,
    UsageError,
    machine_error,
)
from codecllm.formats.manifest.unlisted import refuse_unlisted
from codecllm.formats.shards.index import check_index
from codecllm.hub import resolve
from codecllm.loader.config_size import check_config_arguments, check_config_of
from codecllm.loader.device.codecs import Decoder
from codecllm.loader.device.placement import refuse_without_device
from codecllm.loader.hf import placement, quantizer
from codecllm.loader.hf.folder import (
    GENERATION_CONFIG_NAME,
    describe,
    read_config,
    read_generation_config,
)
from codecllm.loader.hf.listed import for_model, for_model_with_code, listed_files
from codecllm.loader.hf.model_class import described_tensors, model_class
from codecllm.loader.hf.remote_code import building, check_code, code_class, explain_missing_code
from codecllm.loader.load import Load, LoadOptions
from codecllm.loader.progress import OnProgress
from codecllm.loader.residents import Resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REFUSED = frozenset(
    [
        *("state_dict", "quantization_config", "gguf_file", "subfolder", "variant", "from_tf"),
        "transformers_weights",
        # Of the functions below this one, which give them themselves.
        *("pretrained_model_name_or_path", "return_unused_kwargs"),
        *("config_class", "model", "run_code"),
    ]
)
"""Arguments of transformers' `from_pretrained` that say where the weights are, which a container
does, or what the load itself decides."""


def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    auto_class: Any = None,
    resident: Resident | Literal["auto"] = "auto",
    decoder: Decoder = "auto",
    workers: int | None = None,
    expected_manifest_sha256: str | None = None,
    progress: bool | OnProgress | None = None,
    trust_remote_code: bool = False,
    **hf_kwargs: Any,
) -> PreTrainedModel:
    """Loads a container as transformers loads the model that it was made from.

    The class, its config, names, tied weights, dtypes, generation defaults and warnings are those
    of transformers' own `from_pretrained` of the source. Every byte of a weight is compared with
    its checksum before it is decoded. Weights that the plain load of the source leaves over (a head
    that the class lacks, say) are recorded in the container: the same is a warning here, and
    anything else that is missing or left over an error. A model is returned only when it is
    complete.

    Args:
        name_or_path: container folder or Hub id (`user/name`).
        revision: branch, tag or commit of a Hub id.
        token: Hub token.
        cache_dir: Hub cache.
        dtype: dtype of the weights, for example `torch.bfloat16` or `"bfloat16"`; None and "auto"
            take the source's.
        device_map: as in transformers; None loads onto the CPU. Devices must be here, and not meta.
        auto_class: class to load, one of transformers' Auto classes or a model class, for example
            `transformers.AutoModelForSequenceClassification`; None takes the class that the config
            names, or where transformers has no such class the usual one that the weights fill best.
            With a class of the caller, weights that it lacks are initialised, with a warning, as
            transformers does; a class that finds none of its weights is an error. The class may be
            that of a part, such as `transformers.CLIPTextModel` for a container of CLIP.
        resident: how weights lie in memory. `auto`: `dense` if that fits beside a cache of 4096
            tokens; else on a GPU `packed`, and on the CPU `int8` if the container has codes, or
            `compressed`. The log and the model's attribute `codecllm_resident` say which and why. A
            device map that may spread the model takes `dense`. `dense`: as `dtype` in plain
            modules. `int8`: codes and
            scales stay, about half of bf16's bytes; products are those of dense or, with another
            kernel, within its rounding (`int8_matmul.int8_product`). `compressed`: payloads stay
            coded as in the files and each weight is decoded just before it is used: least memory,
            the bits of dense, and the time of decoding the whole model for every forward pass.
            `packed`, on a GPU: codes of 2 to 8 bits, or lossless bfloat16 in 12, at a fixed rate;
            products within the rounding of dense (`packed.product`).
        decoder: where chunks are decoded for a model on a GPU, with the same bits. `auto`: there,
            as far as it can, else on the CPU. `cpu`: on the CPU. `nvcomp`, `triton`: zstd by
            nvCOMP, `rans` by our kernel, or an error that says why not.
        workers: threads that read and decode; None takes one per core, without the native core at
            most six. For tensors that a GPU decodes no more than three read.
        expected_manifest_sha256: accept only the container with this manifest. It pins every byte:
            an unlisted file that a class of transformers might read is an error too.
        progress: True draws a bar on stderr, False draws none, a callback gets the tensor's name,
            bytes done and bytes in all; None leaves it to transformers' own bar.
        trust_remote_code: whether Python code that the container lists may run. Each file is
            compared with its checksum before; code that is not listed is an error.
        hf_kwargs: further arguments of transformers' `from_pretrained`, for example
            `attn_implementation`, `max_memory`, `key_mapping`, `num_labels`, `output_loading_info`.

    Returns:
        The model, in evaluation mode, with no tie to the container's files; with
        `output_loading_info=True` the model and transformers' report. `model.codecllm_resident` is
        a `loader.residents.Chosen`.

    Raises:
        FormatError: the container is damaged or is none, or transformers cannot read a side file.
        ModelMismatchError: its tensors are not those of the model class.
        UnsupportedEnvironmentError: this transformers or torch lacks the class or a dtype, or this
            machine a device.
        HubError: the repository cannot be reached, found or read.
        UsageError: the arguments contradict each other or the container.
        MemoryError, torch.OutOfMemoryError: memory of the host or of the device ran out. What the
            load had taken is free again once the error is dropped.
    """
    check_arguments(
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        workers=workers,
        expected_manifest_sha256=expected_manifest_sha256,
        trust_remote_code=trust_remote_code,
    )
    named_before = hf_kwargs.pop("torch_dtype", None)  # transformers' older name of `dtype`
    dtype = named_before if dtype is None else dtype
    _check_arguments(resident, decoder, dtype, hf_kwargs)
    _check_objects(auto_class, progress, hf_kwargs.get("config"))
    refuse_without_device(decoder, resident, device_map)
    placement.check_device_map(device_map)
    placement.refuse_without_folder(device_map, hf_kwargs.get("offload_folder"))
    files = resolve(name_or_path, revision=revision, token=token, cache_dir=cache_dir, kind="model")
    spreading = {}
    if resident not in ("auto", "dense") and placement.spreads(device_map):
        # transformers would spread, and maybe offload, weights before they are what they stay.
        names = ("max_memory", "offload_folder")
        spreading = {name: hf_kwargs.pop(name) for name in names if name in hf_kwargs}
        spreading["device_map"], device_map = device_map, None
    options = LoadOptions(
        resident=resident,
        decoder=decoder,
        dtype=_torch_dtype(dtype),
        workers=workers,
        progress=progress,
        device_map=device_map,
        max_memory=hf_kwargs.get("max_memory"),
        complete=auto_class is None and not hf_kwargs.get("key_mapping"),
    )
    with closing(Load(files.folder, options, expected_manifest_sha256)) as load:
        if expected_manifest_sha256 is not None:
            refuse_unlisted(files.folder, load.container.manifest)
        result = _checked_and_built(
            load, auto_class, dtype, device_map, trust_remote_code, hf_kwargs
        )
    model = result[0] if isinstance(result, tuple) else result
    if spreading:
        placement.spread(model, **spreading)
    model.name_or_path = model.config._name_or_path = str(name_or_path)
    return result


def load_opened(container: Container, workers: int | None = None) -> PreTrainedModel:
    """Loads an opened container again, on the CPU: the same manifest, whatever lies beside it.

    Errors as `from_pretrained`; `workers` as there.
    """
    options = LoadOptions(resident="dense", workers=workers, complete=True)
    with closing(Load(container.folder, options, container.manifest_sha256)) as load:
        model = _checked_and_built(load, None, None, None, False, {})
    model.name_or_path = model.config._name_or_path = str(container.folder)
    return model


def _checked_and_built(
    load: Load,
    auto_class: Any,
    dtype: Any,
    device_map: Any,
    run_code: bool,
    hf_kwargs: dict[str, Any],
) -> Any:
    auto_map = _check_config(load)
    if run_code:
        check_code(load.container, auto_map)
    try:
        # transformers sees the listed files, with the weights of `load`.
        choice = for_model_with_code if run_code else for_model
        with listed_files(load.container, choice) as folder:
            if load.container.manifest.file(GENERATION_CONFIG_NAME) is not None:
                read_generation_config(folder)  # its error would be a warning later
            return _build(folder, load, auto_class, dtype, device_map, run_code, hf_kwargs)
    except UnsupportedEnvironmentError as exc:
        if run_code:
            raise
        raise explain_missing_code(load.container, auto_map, exc) from exc


def _check_arguments(resident: str, decoder: str, dtype: Any, hf_kwargs: dict[str, Any]) -> None:
    refused_names = sorted(_REFUSED & hf_kwargs.keys())
    if refused_names:
        raise UsageError(f"from_pretrained of a container takes no {', '.join(refused_names)}")
    if hf_kwargs.get("use_safetensors") is False:
        raise UsageError(
            "the weights of a container are in safetensors", got="use_safetensors=False"
        )
    choice(("auto", *get_args(Resident)))(resident, "resident")
    choice(get_args(Decoder))(decoder, "decoder")
    named = _torch_dtype(dtype)
    if dtype not in (None, "auto") and (named is None or not named.is_floating_point):
        raise refusal(dtype, "dtype", "a float dtype such as torch.bfloat16")


def _check_objects(auto_class: Any, progress: Any, config: Any) -> None:
    """Refuses arguments that are none of what they are for, before anything is read."""
    from transformers import PretrainedConfig

    is_class = callable(getattr(auto_class, "from_pretrained", None)) and not (
        isinstance(auto_class, type) and issubclass(auto_class, PretrainedConfig)
    )
    for name, value, is_right, expected in (
        ("auto_class", auto_class, is_class, "a class of models"),
        ("progress", progress, isinstance(progress, bool) or callable(progress), "bool, callable"),
        ("config", config, isinstance(config, PretrainedConfig), "a config of transformers"),
    ):
        if value is not None and not is_right:
            raise refusal(value, name, expected)


def _torch_dtype(dtype: Any) -> torch.dtype | None:
    """Returns the dtype of an argument; None for None, "auto", and what is no dtype."""
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return value if isinstance(value, torch.dtype) else None


def _check_config(load: Load) -> dict[str, Any] | None:
    """Reads the config, and compares its size and the shards' sizes with the manifest.

    Returns:
        The config's `auto_map`, or None.

    Raises:
        FormatError: the config, the index or a shard differs from the manifest.
        ModelMismatchError: the config describes far more layers than the container can fill.
    """
    container, document = load.container, load.config
    if document is None:
        raise NotAContainerError(
            "container has no config.json: no model can be built from it",
            file=str(container.folder),
        )
    # Before transformers builds anything: a hostile config would cost minutes and gigabytes.
    check_config_of(container, document)
    for shard in container.manifest.shards:
        container.check_presence(shard)
    check_index(container)
    auto_map = document.get("auto_map")
    return auto_map if isinstance(auto_map, dict) else None


def _error_of_weights(exc: BaseException) -> BaseException:
    """Returns the error to raise where a weight could not be decoded, read or put in its place."""
    if isinstance(exc, CodecLLMError | OSError) or not isinstance(exc, Exception):
        return exc
    return machine_error(exc) or UnsupportedEnvironmentError(
        f"a weight cannot be put in its place: {describe(exc)}"
    )


def _build(
    folder: Path,
    load: Load,
    auto_class: Any,
    dtype: Any,
    device_map: Any,
    run_code: bool,
    hf_kwargs: dict[str, Any],
) -> Any:
    config = hf_kwargs.pop("config", None)
    # A config's class makes its labels at once, as many as it is told.
    check_config_arguments(load.container, load.config, hf_kwargs)
    read = partial(read_config, folder, run_code=run_code, return_unused_kwargs=True, **hf_kwargs)
    stored_config, other_options = read()
    part_class = getattr(auto_class, "config_class", None)
    if part_class is not None and not isinstance(stored_config, part_class):
        # The class is a part of the model, such as the text tower, and has a config of its own.
        stored_config, other_options = read(config_class=part_class)
    if config is None:
        changed = sorted(hf_kwargs.keys() - other_options.keys())
        config, hf_kwargs = stored_config, other_options
    else:
        changed = ["config"]
        # A config of the caller has no block of ours, without which transformers would read coded
        # bytes as weights.
        config.quantization_config = stored_config.quantization_config
    cls = auto_class or (code_class(config) if run_code else None)
    cls = cls or model_class(config, partial(described_tensors, load.container))
    try:
        with quantizer.using(load), building(run_code):
            return cls.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=run_code,
                **hf_kwargs,
            )
    except Exception as exc:
        # Our error names shard, tensor and chunk; transformers' summary of it does not.
        if load.first_error is not None:
            raise _error_of_weights(load.first_error) from exc
        if isinstance(exc, ModelMismatchError) and changed:
            raise ModelMismatchError(
                f"{exc}; arguments of this call changed the config: {', '.join(changed)}"
            ) from exc
        if isinstance(exc, CodecLLMError):
            raise
        machine = machine_error(exc)
        if machine is not None:
            raise machine from exc
        wrong_shapes = load.mismatched()
        if wrong_shapes:
            raise ModelMismatchError(
                f"the container's tensors are not those of {cls.__name__}; "
                f"mis-shaped: {', '.join(wrong_shapes)}"
            ) from exc
        raise ModelMismatchError(
            f"transformers could not build {cls.__name__}: {describe(exc)}"
        ) from exc
