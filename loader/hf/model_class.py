"""Which class loads a folder, and which report transformers would give of that load."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from transformers.models.auto import auto_factory

from codecllm.formats.container import Container
from codecllm.formats.errors import UnsupportedEnvironmentError, foreign_errors_as, machine_error
from codecllm.loader.hf.quiet import silenced, without_progress_bars
from codecllm.loader.hf.remote_code import building
from codecllm.loader.load_report import LoadReport
from codecllm.loader.torch_tensors import torch_dtype

_AUTO_CLASSES = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModel",
)
"""Auto classes that are tried for a config without a known architecture.

The first of equally good ones is taken. Encoders have a causal class too, so the masked one stands
before it.
"""


Tensors = Mapping[str, torch.Tensor]
"""Name -> tensor on the meta device, of everything that a folder holds."""


def model_class(config: Any, tensors: Callable[[], Tensors] | None = None) -> Any:
    """Returns the class of transformers that a config's `architectures` names.

    Where it names none that transformers has (none at all, a wrapper's, one of custom code), the
    class is the one of the model type's usual task classes for which the fewest weights are
    missing, then the one that leaves the fewest over.

    Args:
        config: a transformers config.
        tensors: returns the tensors of the folder, and is called only where the config names no
            class; None takes the first of the usual ones.

    Raises:
        UnsupportedEnvironmentError: transformers has no class for this type of config, or cannot
            import it here.
    """
    architectures = getattr(config, "architectures", None)
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        with _import_errors(str(name)):
            cls = getattr(transformers, name, None) if isinstance(name, str) else None
        # Not one of transformers' Auto classes: these look up code of the folder.
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    candidates = _usual_classes(config)
    if not candidates:
        raise UnsupportedEnvironmentError(
            f"transformers {transformers.__version__} has no class for this model",
            file="config.json",
            got=f"architectures {names}, model_type {getattr(config, 'model_type', None)!r}",
        )
    if tensors is None or len(candidates) == 1:
        return candidates[0]

    tensors_on_meta = tensors()

    def left_over(candidate: Any) -> tuple[int, int]:
        try:
            report = rehearse(candidate, config, tensors_on_meta)
        except Exception as exc:  # the load of the class that is taken says why
            machine = machine_error(exc)
            if machine is not None:
                raise machine from exc
            return sys.maxsize, 0
        return len(report.missing), len(report.unexpected)

    return min(candidates, key=left_over)


def described_tensors(container: Container) -> dict[str, torch.Tensor]:
    """Returns every tensor of a container by name, on the meta device: shape and dtype only."""
    return {
        record.name: torch.empty(
            record.shape, dtype=torch_dtype(record.dtype, record.name), device="meta"
        )
        for record in container.manifest.tensors
    }


def rehearse(cls: Any, config: Any, tensors: Tensors) -> LoadReport:
    """Returns the report of transformers on a load without weights; see `rehearsed`."""
    return rehearsed(cls, config, tensors)[1]


def rehearsed(cls: Any, config: Any, tensors: Tensors) -> tuple[Any, LoadReport]:
    """Loads a model without weights.

    Returns the model, whose parameters have no memory, and the report of transformers on the names.

    Args:
        cls: a model class.
        config: its config; it is not changed.
        tensors: the tensors of the folder.

    Raises:
        Exception: transformers cannot build the class; the type is any.
    """
    # A copy: building a model writes into its config.
    config = copy.deepcopy(config)
    strip_quantization(config)
    with silenced(), without_progress_bars(), building():
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            device_map={"": "meta"},
            output_loading_info=True,
            # Sizes are the load's to judge; a class is chosen by names.
            ignore_mismatched_sizes=True,
        )
    return model, LoadReport.of(cls.__name__, info["missing_keys"], info["unexpected_keys"])


def strip_quantization(config: Any) -> None:
    """Takes our block out of a config, so that transformers sees a plain model."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config


def _import_errors(name: str) -> AbstractContextManager[None]:
    """Raises our error for those of transformers, which imports a class when it is asked for it.

    A library may be missing for it, and under `python -OO` its docstrings are.
    """
    return foreign_errors_as(
        UnsupportedEnvironmentError, f"transformers cannot import {name}", limit=300
    )


def _usual_classes(config: Any) -> list[Any]:
    classes = []
    for name in _AUTO_CLASSES:
        # An encoder that is configured as a decoder masks nothing.
        if name == "AutoModelForMaskedLM" and getattr(config, "is_decoder", False):
            continue
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            with _import_errors(name):
                candidate = auto_factory._get_model_class(config, mapping)
            if candidate not in classes:
                classes.append(candidate)
    return classes
