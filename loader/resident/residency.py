"""Decides which weights stay in memory as codes or as coded payloads, and prepares model and state dict for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError, UsageError
from codecllm.formats.manifest.records import (
    AliasTensor,
    CodedTensor,
    Int8Tensor,
    LosslessTensor,
    RawTensor,
)
from codecllm.formats.shards.side_tensors import COL_SCALE, SCALE
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.device.engine import DeviceEngine
from codecllm.loader.device.plan import decodes_on_device
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.progress import Meter
from codecllm.loader.promise import Promise
from codecllm.loader.reader import TensorReader
from codecllm.loader.resident.compressed_modules import (
    CodedMatrix,
    CompressedWeight,
    SharedDecoder,
    compressed_twin,
)
from codecllm.loader.resident.int8_modules import Int8Weight, int8_twin
from codecllm.loader.resident.on_device import DeviceCompressedTensor, DeviceDecoder
from codecllm.loader.state_dict import LazyTensor, prefetch


class Residency:
    """The plan of one load that keeps weights in another form than plain parameters.

    A candidate is the weight of a plain linear layer or embedding, alone or together with every module that is tied to it. What
    is no candidate (Conv1D, fused experts, embeddings that scale) is loaded dense.

    Attributes:
        modules: names of the modules that were replaced.
    """

    def __init__(
        self,
        records: dict[str, CodedTensor],
        reader: TensorReader,
        state_dict: dict[str, LazyTensor],
    ) -> None:
        """Keeps the candidates, by every name that the container has for them, and the state dict to be changed."""
        self._records = records
        self._reader = reader
        self._state_dict = state_dict
        self.modules: list[str] = []

    def prepare(
        self, model: nn.Module, prefix: str, tied: dict[str, str], dtype: torch.dtype
    ) -> None:
        """Replaces modules of the empty model, changes what the state dict yields for them, and starts to read it.

        Args:
            model: the model on the meta device.
            prefix: name of its base model; names in the container may have or lack it.
            tied: the model's own: name of a parameter -> name of the parameter that it is tied to.
            dtype: dtype of the model's weights.
        """
        parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        partners = _groups(tied)
        for name, record in self._records.items():
            target = _parameter_name(name, prefix, parameters)
            if target is None or not _by_rows(record):
                continue
            group = sorted(partners.get(target, {target}))
            if all(
                parameters.get(member) == tuple(record.shape) for member in group
            ) and self._swap(model, record, group):
                own_prefix = name.removesuffix(target) if name.endswith(target) else ""
                self._redirect(name, own_prefix, record, group, tied, dtype)
        prefetch(self._reader, self._state_dict)

    def finish(self, model: nn.Module) -> None:
        """Verifies the replaced modules and ends their loading; see the subclasses."""

    def _swap(self, model: nn.Module, record: CodedTensor, group: list[str]) -> bool:
        """Replaces the modules that own the parameters of a group; whether all of them could be, or were before."""
        owners = [member.removesuffix(".weight") for member in group]
        twins = [self._twin(model.get_submodule(owner), record) for owner in owners]
        if any(
            twin is None and owner not in self.modules
            for twin, owner in zip(twins, owners, strict=True)
        ):
            return False
        for owner, twin in zip(owners, twins, strict=True):
            if twin is not None:
                model.set_submodule(owner, twin)
                self.modules.append(owner)
        return True

    def _twin(self, module: nn.Module, record: CodedTensor) -> nn.Module | None:
        """Returns the module that takes the place of a plain one, or None."""
        raise NotImplementedError

    def _redirect(
        self,
        name: str,
        own_prefix: str,
        record: CodedTensor,
        group: list[str],
        tied: dict[str, str],
        dtype: torch.dtype,
    ) -> None:
        """Changes what the state dict yields for the container's tensor `name`."""
        raise NotImplementedError


class ResidentInt8(Residency):
    """resident="int8": codes and scales stay in memory. Wide tensors, whose codes have 16 bits, are loaded dense."""

    def __init__(
        self, container: Container, reader: TensorReader, state_dict: dict[str, LazyTensor]
    ) -> None:
        """Collects the int8 tensors.

        Raises:
            UsageError: the container holds none.
        """
        stored = {name: stored_record(container, name) for name in container.records}
        records: dict[str, CodedTensor] = {
            name: record
            for name, record in stored.items()
            if isinstance(record, Int8Tensor) and not record.wide
        }
        if not records:
            raise UsageError(
                "resident='int8' needs an int8 container; this one holds no int8 tensor whose codes fit 8 bits"
            )
        super().__init__(records, reader, state_dict)

    def finish(self, model: nn.Module) -> None:
        """Verifies that each replaced module, and no other, got its codes and scales, and ends their loading.

        Raises:
            ModelMismatchError: a module lacks them, or codes ended up as a weight.
        """
        modules = set(self.modules)
        for name, module in model.named_modules():
            if isinstance(module, Int8Weight):
                scales = [
                    scale
                    for scale in (module.weight_scale, module.weight_col_scale)
                    if scale is not None
                ]
                complete = module.weight.dtype == torch.int8 and all(
                    scale.dtype == torch.float32 for scale in scales
                )
                if name not in modules or not complete:
                    raise ModelMismatchError("int8 module is incomplete", tensor=f"{name}.weight")
            elif getattr(getattr(module, "weight", None), "dtype", None) == torch.int8:
                raise ModelMismatchError(
                    "int8 codes were taken for a weight", tensor=f"{name}.weight"
                )
        for module in model.modules():
            if isinstance(module, Int8Weight):
                module.seal()

    def _twin(self, module: nn.Module, record: CodedTensor) -> nn.Module | None:
        return int8_twin(module, record.xxh3.col_scale is not None)

    def _redirect(
        self,
        name: str,
        own_prefix: str,
        record: CodedTensor,
        group: list[str],
        tied: dict[str, str],
        dtype: torch.dtype,
    ) -> None:
        self._state_dict[name] = LazyTensor(self._reader, record, "codes", dtype)
        # Every module of the group has a scale of its own name; parameters are tied by transformers, buffers are not.
        self._reader.share(record.name)
        for member in group:
            self._state_dict[SCALE.name_for(own_prefix + member)] = LazyTensor(
                self._reader, record, "scale", dtype
            )
            if record.xxh3.col_scale is not None:
                columns = LazyTensor(self._reader, record, "col_scale", dtype)
                self._state_dict[COL_SCALE.name_for(own_prefix + member)] = columns


class ResidentCompressed(Residency):
    """resident="compressed": payloads stay coded in memory and are decoded where they are used."""

    def __init__(
        self,
        container: Container,
        reader: TensorReader,
        state_dict: dict[str, LazyTensor],
        workers: int | None,
        meter: Meter,
        engine: DeviceEngine | None = None,
    ) -> None:
        """Collects the coded tensors; `workers` threads stay with the model to decode them.

        What the device of `engine` can decode stays in its memory and is decoded there.

        Raises:
            UsageError: the container holds none.
        """
        stored = {name: stored_record(container, name) for name in container.records}
        records: dict[str, CodedTensor] = {
            name: record
            for name, record in stored.items()
            if isinstance(record, Int8Tensor | LosslessTensor)
        }
        if not records:
            raise UsageError("resident='compressed' needs coded tensors; this container holds none")
        super().__init__(records, reader, state_dict)
        self._container = container
        self._decoder = SharedDecoder(decoding_threads(workers))
        self._meter = meter
        self._payloads: dict[str, CodedMatrix] = {}
        self._checked: list[tuple[CodedTensor, Promise[torch.Tensor]]] = []
        self._engine = engine
        self._device = DeviceDecoder(engine.streams, engine.codecs) if engine is not None else None
        self._on_device: list[DeviceCompressedTensor] = []

    def prepare(
        self, model: nn.Module, prefix: str, tied: dict[str, str], dtype: torch.dtype
    ) -> None:
        """See `Residency.prepare`; payloads for a device are brought there at once.

        Raises:
            FormatError: one is damaged or does not decode.
        """
        super().prepare(model, prefix, tied, dtype)
        if self._device is not None and self._engine is not None and self._on_device:
            with torch.device(
                "cpu"
            ):  # transformers calls this where new tensors go to the meta device
                self._device.load(self._on_device, self._engine)
            for tensor in self._on_device:
                self._meter.add(tensor.stored.record.name, tensor.stored.record.source_bytes)

    def finish(self, model: nn.Module) -> None:
        """Waits until all payloads are read and checked; verifies that every module that was replaced is still in its place.

        Raises:
            FormatError: a payload is damaged.
            ModelMismatchError: a module was replaced again.
        """
        for record, checked in self._checked:
            checked.get()
            self._meter.add(record.name, record.source_bytes)
        for name in self.modules:
            if not isinstance(model.get_submodule(name), CompressedWeight):
                raise ModelMismatchError(
                    "compressed module was replaced again", tensor=f"{name}.weight"
                )

    def _twin(self, module: nn.Module, record: CodedTensor) -> nn.Module | None:
        return compressed_twin(module, lambda: self._payload(record))

    def _payload(self, record: CodedTensor) -> CodedMatrix:
        if record.name not in self._payloads:
            source = self._container.tensor(record.name)
            assert isinstance(source, StoredTensor)
            if (
                self._device is not None
                and self._engine is not None
                and decodes_on_device(source, self._engine.codecs)
            ):
                with torch.device("cpu"):
                    held = self._device.hold(source)
                self._on_device.append(held)
                self._payloads[record.name] = held
                return held
            self._payloads[record.name], payload = self._decoder.hold(source)
            self._checked.append((record, self._reader.keep(record.name, payload)))
        return self._payloads[record.name]

    def _redirect(
        self,
        name: str,
        own_prefix: str,
        record: CodedTensor,
        group: list[str],
        tied: dict[str, str],
        dtype: torch.dtype,
    ) -> None:
        self._state_dict.pop(name, None)
        for member in group:  # the modules share the payload; there is no parameter left to tie
            tied.pop(member, None)


def stored_record(container: Container, name: str) -> RawTensor | CodedTensor:
    """Returns the record of a tensor that has bytes of its own: the alias's target, or the tensor itself."""
    record = container.records[name]
    target = container.records[record.alias_of] if isinstance(record, AliasTensor) else record
    assert not isinstance(target, AliasTensor)
    return target


def _by_rows(record: CodedTensor) -> bool:
    """Whether the record's matrix is the weight as it is: two dimensions, scales (if any) by rows."""
    by_rows = not isinstance(record, Int8Tensor) or (
        record.channel_kind == "row" and record.channel_axis == 0
    )
    return by_rows and len(record.shape) == 2


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
