"""Decides which weights stay in memory as codes or as coded payloads, and prepares model and state dict for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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
from codecllm.loader.hf.hooks import Destination
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
        self, model: nn.Module, places: Sequence[Destination], tied: dict[str, str]
    ) -> None:
        """Replaces modules of the empty model, changes what the state dict yields, starts to read.

        Args:
            model: the model on the meta device.
            places: where transformers puts each tensor, and in which dtype.
            tied: the model's own table: parameter -> parameter that it is tied to. Ties between
                tensors that differ in the container are taken out: transformers does not tie them.
        """
        parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        by_parameter = {place.parameter: place for place in places if place.alone}
        stored = {
            place.parameter: self._records[place.stored].name
            for place in by_parameter.values()
            if place.stored in self._records
        }
        partners, origins = _groups(tied), _origins(tied, by_parameter)
        for parameter, place in by_parameter.items():
            record = self._records.get(place.stored)
            if record is None or not parameter.endswith(".weight") or not _by_rows(record):
                continue
            tied_together = partners.get(parameter, {parameter})
            group = [
                member
                for member in sorted(tied_together)
                if origins.get(member) == parameter or stored.get(member) == record.name
            ]
            fits = all(parameters.get(member) == tuple(record.shape) for member in group)
            if fits and self._swap(model, record, group, place.dtype):
                self._redirect(place, record, group, tied)
                for member in tied_together.difference(group):
                    _untie(tied, member, parameter)
        prefetch(self._reader, self._state_dict)

    def finish(self, model: nn.Module) -> None:
        """Verifies the replaced modules and ends their loading; see the subclasses."""

    def _swap(
        self, model: nn.Module, record: CodedTensor, group: list[str], dtype: torch.dtype
    ) -> bool:
        """Replaces the modules that own the parameters of a group, for weights of `dtype`.

        Returns:
            Whether all of them could be replaced, or were before.
        """
        owners = [member.removesuffix(".weight") for member in group]
        for owner in owners:
            weight = model.get_submodule(owner)._parameters.get("weight")
            if weight is not None and weight.is_floating_point():
                weight.data = weight.data.to(dtype)  # on the meta device: what twins are made of
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
        self, place: Destination, record: CodedTensor, group: list[str], tied: dict[str, str]
    ) -> None:
        """Changes what the state dict yields for the tensor that goes to `place`."""
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
        self, place: Destination, record: CodedTensor, group: list[str], tied: dict[str, str]
    ) -> None:
        self._state_dict[place.stored] = LazyTensor(self._reader, record, "codes", place.dtype)
        # Each module of the group has scales of its own: transformers ties parameters, not buffers.
        self._reader.share(record.name)
        for member in group:
            scale = LazyTensor(self._reader, record, "scale", place.dtype)
            self._state_dict[SCALE.name_for(member)] = scale
            if record.xxh3.col_scale is not None:
                columns = LazyTensor(self._reader, record, "col_scale", place.dtype)
                self._state_dict[COL_SCALE.name_for(member)] = columns


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
        self, model: nn.Module, places: Sequence[Destination], tied: dict[str, str]
    ) -> None:
        """See `Residency.prepare`; payloads for a device are brought there at once.

        Raises:
            FormatError: one is damaged or does not decode.
        """
        super().prepare(model, places, tied)
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
        self, place: Destination, record: CodedTensor, group: list[str], tied: dict[str, str]
    ) -> None:
        self._state_dict.pop(place.stored, None)
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


def _origins(tied: Mapping[str, str], present: Collection[str]) -> dict[str, str]:
    """Returns, for each parameter, the one with a tensor in the file whose weight it gets.

    As transformers ties after a load: a parameter without a tensor takes that of the one it is tied
    to, and where this has none either, the first tensor that is there of those tied to it.
    """
    origins = {name: name for name in present}
    for target, source in tied.items():
        if source not in origins:
            others = [name for name, other in tied.items() if other == source and name in present]
            if others:
                origins[source] = others[0]
        if target not in origins and source in origins:
            origins[target] = origins[source]
    return origins


def _untie(tied: dict[str, str], a: str, b: str) -> None:
    """Takes the tie between two parameters out of a model's table."""
    for target, source in ((a, b), (b, a)):
        if tied.get(target) == source:
            del tied[target]


def _groups(tied: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns, for each parameter that takes part in a tie, the names of all parameters tied together with it."""
    groups: dict[str, set[str]] = {}
    for a, b in tied.items():
        union = groups.get(a, {a}) | groups.get(b, {b})
        for name in union:
            groups[name] = union
    return groups
