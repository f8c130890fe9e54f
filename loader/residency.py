"""Decides which tensors stay int8 in memory, and prepares model and state dict for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError, UsageError
from codecllm.formats.manifest import AliasTensor, Int8Tensor
from codecllm.loader.int8_modules import Int8Weight, int8_twin
from codecllm.loader.state_dict import SCALE_SUFFIX, LazyTensor, TensorReader


class ResidentInt8:
    """The plan of one load with resident="int8".

    A tensor stays int8 if it is stored by rows and is the weight of a plain linear layer or embedding, alone or together with
    every module that is tied to it. Any other int8 tensor (Conv1D, fused experts, embeddings that scale) is dequantized.

    Attributes:
        modules: names of the modules that were replaced.
    """

    def __init__(self, container: Container, reader: TensorReader, state_dict: dict[str, LazyTensor]) -> None:
        """Collects the candidates.

        Raises:
            UsageError: the container holds no int8 tensor.
        """
        self._records = {
            name: target
            for name, record in container.records.items()
            if isinstance(target := container.records[_stored_name(record)], Int8Tensor)
        }
        if not self._records:
            raise UsageError("resident='int8' needs an int8 container; this one holds no int8 tensor")
        self._reader = reader
        self._state_dict = state_dict
        self.modules: list[str] = []

    def prepare(self, model: nn.Module, prefix: str, tied: Mapping[str, str], dtype: torch.dtype) -> None:
        """Replaces modules of the empty model and lets the state dict yield codes and scales for them.

        Args:
            model: the model on the meta device.
            prefix: name of its base model; names in the container may have or lack it.
            tied: name of a parameter -> name of the parameter that it is tied to.
            dtype: dtype of the model's weights.
        """
        parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        partners = _groups(tied)
        for name, record in self._records.items():
            target = _parameter_name(name, prefix, parameters)
            if target is None or record.channel_kind != "row" or record.channel_axis != 0 or len(record.shape) != 2:
                continue
            group = partners.get(target, {target})
            if all(parameters.get(member) == tuple(record.shape) for member in group):
                self._swap(model, name, record, target, sorted(group), dtype)

    def finish(self, model: nn.Module) -> None:
        """Verifies that each replaced module, and no other, got its codes and scales, and ends their loading.

        Raises:
            ModelMismatchError: a module lacks them, or codes ended up as a weight.
        """
        modules = set(self.modules)
        for name, module in model.named_modules():
            if isinstance(module, Int8Weight):
                complete = module.weight.dtype == torch.int8 and module.weight_scale.dtype == torch.float32
                if name not in modules or not complete:
                    raise ModelMismatchError("int8 module is incomplete", tensor=f"{name}.weight")
            elif getattr(getattr(module, "weight", None), "dtype", None) == torch.int8:
                raise ModelMismatchError("int8 codes were taken for a weight", tensor=f"{name}.weight")
        for module in model.modules():
            if isinstance(module, Int8Weight):
                module.seal()

    def _swap(self, model: nn.Module, name: str, record: Int8Tensor, target: str, group: list[str], dtype: torch.dtype) -> None:
        owners = [member.removesuffix(".weight") for member in group]
        twins = [int8_twin(model.get_submodule(owner)) if owner + ".weight" in group else None for owner in owners]
        if any(twin is None and owner not in self.modules for twin, owner in zip(twins, owners, strict=True)):
            return
        for owner, twin in zip(owners, twins, strict=True):
            if twin is not None:
                model.set_submodule(owner, twin)
                self.modules.append(owner)
        self._state_dict[name] = LazyTensor(self._reader, record, "codes", dtype)
        # Every module of the group has a scale of its own name; parameters are tied by transformers, buffers are not.
        self._reader.share(record.name)
        own_prefix = name.removesuffix(target) if name.endswith(target) else ""
        for member in group:
            self._state_dict[own_prefix + member + SCALE_SUFFIX] = LazyTensor(self._reader, record, "scale", dtype)


def _stored_name(record: object) -> str:
    return record.alias_of if isinstance(record, AliasTensor) else record.name  # type: ignore[attr-defined]


def _parameter_name(name: str, prefix: str, parameters: Mapping[str, object]) -> str | None:
    """Returns the model's name of a container's tensor: the same, or with the base model's prefix added or removed."""
    candidates = [name, f"{prefix}.{name}" if prefix else name, name.removeprefix(f"{prefix}.")]
    found = next((candidate for candidate in candidates if candidate in parameters), None)
    return found if found is not None and found.endswith(".weight") else None


def _groups(tied: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns, for each parameter that takes part in a tie, the names of all parameters tied together with it."""
    groups: dict[str, set[str]] = {}
    for a, b in tied.items():
        union = groups.get(a, {a}) | groups.get(b, {b})
        for name in union:
            groups[name] = union
    return groups
