"""Decides which weights stay in memory as codes or as coded payloads.

The state dict of the load then yields them.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from transformers import Conv1D

from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.formats.manifest.records import (
    CodedTensor,
    Int8Tensor,
    RawTensor,
)
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.device.engine import DeviceEngine
from codecllm.loader.device.placement import concrete
from codecllm.loader.device.plan import decodes_on_device
from codecllm.loader.engine import Request
from codecllm.loader.experts.forward import join_experts, use_kernel
from codecllm.loader.hf.experts import loops_over_experts, use_loop
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.progress import Meter
from codecllm.loader.promise import Awaited
from codecllm.loader.reader import CPU, TensorReader
from codecllm.loader.resident.coded_weight import (
    CodedWeight,
    coded_parameter,
    plain_copy,
    settle,
)
from codecllm.loader.resident.compressed_form import CodedMatrix, SharedDecoder
from codecllm.loader.resident.escapes import split_codes
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.on_device import DeviceDecoder
from codecllm.loader.resident.scaled_codes import ScaledCodes
from codecllm.loader.state_dict import LazyTensor, prefetch

KEEPING_MODULES = (nn.Linear, nn.Embedding, Conv1D)
"""Modules whose weight stays coded.

Other modules may read theirs in any way and any number of times: they get plain weights.
"""


class Residency(ABC):
    """The plan of one load that keeps weights in another form than their dtype.

    The state dict yields coded parameters (`CodedWeight`) for two-dimensional tensors whose scales,
    if any, go by rows. Experts that transformers stacks stay coded, each for itself. Names, ties
    and dtypes are decided where all tensors' are: by transformers, which assigns these parameters
    like any other.
    """

    takes: str
    """The tensors that this residency takes, for the error where a container holds none."""

    def __init__(
        self, container: Container, reader: TensorReader, state_dict: dict[str, LazyTensor]
    ) -> None:
        """Collects the tensors that `can_take` accepts; `prepare` changes the state dict.

        Raises:
            UsageError: the container holds none.
        """
        records: dict[str, CodedTensor] = {}
        for name in container.records:
            record = container.stored_record(name)
            if not isinstance(record, RawTensor) and self.can_take(record):
                records[name] = record
        if not records:
            raise UsageError(f"{self.takes}; this container holds none")
        self._records = {name: record for name, record in records.items() if is_by_rows(record)}
        self._reader = reader
        self._state_dict = state_dict
        self._forms: dict[tuple[str, torch.device], WeightForm | None] = {}
        self._lock = threading.Lock()
        self._buffers: frozenset[str] = frozenset()

    @abstractmethod
    def can_take(self, record: CodedTensor) -> bool:
        """Whether a tensor, if it is a matrix by rows, stays in this form."""

    def prepare(self, model: nn.Module) -> None:
        """Changes the state dict for an empty model, and starts to read everything."""
        self._buffers = frozenset(name for name, _ in model.named_buffers())
        for name, record in self._records.items():
            self._state_dict[name] = CodedLazyTensor(self, self._state_dict[name], record)
        prefetch(self._reader, self._state_dict)

    def finish(self, model: nn.Module) -> None:
        """Makes weights plain that are parts of coded ones, or stand where plain ones belong.

        Codes of experts are joined.
        """
        has_experts = by_kernel = False
        for module_name, module in model.named_modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if not isinstance(weight, CodedWeight):
                    continue
                weight.__dict__.pop("is_loading", None)
                place = f"{module_name}.{name}" if module_name else name
                is_stack = weight.dim() == 3
                is_buffer = place in self._buffers
                keeps = loops_over_experts(module) if is_stack else _keeps_matrices(module)
                has_experts |= is_stack and keeps and not is_buffer
                if weight.form is None:  # a class may cut a tensor of the file into several weights
                    settle(weight, plain_copy(weight))
                    weight.requires_grad_(True)
                elif is_buffer:
                    # transformers assigned a parameter, and torch put that in the buffer's place.
                    delattr(module, name)
                    module.register_buffer(name, plain_copy(weight))
                elif not keeps:
                    settle(weight)  # in place: tied modules hold it too
                    weight.requires_grad_(True)
            unused = join_experts(module)
            by_kernel |= bool(unused)
            for key in [key for key in self._forms if key[0] in unused]:
                del self._forms[key]  # one layer's codes at a time are there twice
        if by_kernel:
            use_kernel(model)
        elif has_experts:
            use_loop(model)

    def form(self, record: CodedTensor, device: torch.device) -> WeightForm | None:
        """Returns the form of a tensor on a device, read once; None: the tensor is loaded dense."""
        with self._lock:
            key = (record.name, device)
            if key not in self._forms:
                self._forms[key] = self._read(record, device)
            return self._forms[key]

    def request(self, record: CodedTensor) -> Request | None:
        """Returns the request that reading a form begins with, or None where it began before."""
        return None

    @abstractmethod
    def _read(self, record: CodedTensor, device: torch.device) -> WeightForm | None:
        """Reads a form; called once for a tensor and a device."""

    def _scales(
        self, record: CodedTensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reads the scales of an int8 tensor: float32 [rows], and [cols] or None."""
        scale = self._reader.read(record.name, "scale", None, device)
        if record.xxh3.col_scale is None:
            return scale, None
        return scale, self._reader.read(record.name, "col_scale", None, device)


class CodedLazyTensor(LazyTensor):
    """A tensor that `to` turns into a coded parameter; see `LazyTensor`."""

    def __init__(self, residency: Residency, plain: LazyTensor, record: CodedTensor) -> None:
        """Takes the place of a lazy tensor with decoded values."""
        self.__dict__.update(plain.__dict__)
        self._residency, self._record = residency, record

    @property
    def request(self) -> Request | None:
        """See `LazyTensor.request`."""
        return self._residency.request(self._record)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Reads the form.

        Args:
            device: where the weight is to lie; None: the CPU.
            dtype: its dtype; None: `self.dtype`.

        Raises:
            FormatError: it is damaged.
        """
        place = CPU if device is None else concrete(torch.device(device))
        try:
            form = self._residency.form(self._record, place)
        except Exception as exc:
            self._reader.first_error = self._reader.first_error or exc
            raise
        if form is None:
            return super().to(device, dtype)
        weight = coded_parameter(form, dtype or self.dtype, place)
        weight.is_loading = True
        return weight


class ResidentInt8(Residency):
    """resident="int8": codes and scales stay in memory.

    Of wide tensors, whose codes have 16 bits, the few codes beyond 8 bits are kept apart. A tensor
    with many of them is loaded dense.
    """

    takes = "resident='int8' needs int8 tensors"

    def can_take(self, record: CodedTensor) -> bool:
        """Whether it has codes."""
        return isinstance(record, Int8Tensor)

    def request(self, record: CodedTensor) -> Request | None:
        """Returns that of the codes."""
        return Request(record.name, "codes")

    def _read(self, record: CodedTensor, device: torch.device) -> WeightForm | None:
        split = split_codes(self._reader.read(record.name, "codes", None, device))
        if split is None:
            return None
        scale, columns = self._scales(record, device)
        return Int8Form(record.name, ScaledCodes(split[0], scale, columns, split[1]))


class ResidentCompressed(Residency):
    """resident="compressed": payloads stay coded in memory and are decoded where they are used."""

    takes = "resident='compressed' needs coded tensors"

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

        Tensors that the device of `engine` can decode stay, and are decoded, in its memory.

        Raises:
            UsageError: the container holds none.
        """
        super().__init__(container, reader, state_dict)
        self._container = container
        self._decoder = SharedDecoder(decoding_threads(workers))
        self._meter = meter
        self._engine = engine
        self._matrices: dict[str, CodedMatrix] = {}
        self._reading: dict[str, Awaited[torch.Tensor]] = {}
        self._device = DeviceDecoder(engine.streams, engine.codecs) if engine is not None else None

    def can_take(self, record: CodedTensor) -> bool:
        """True: every coded tensor has a payload."""
        return True

    def prepare(self, model: nn.Module) -> None:
        """See `Residency.prepare`; payloads for a device are brought there at once.

        Raises:
            FormatError: one of these is damaged or does not decode.
        """
        on_device = []
        for record in {record.name: record for record in self._records.values()}.values():
            source = self._container.tensor(record.name)
            assert isinstance(source, StoredTensor)
            if self._engine is not None and decodes_on_device(source, self._engine.codecs):
                assert self._device is not None
                matrix = self._device.hold(source)
                on_device.append(matrix)
                self._matrices[record.name] = matrix
            else:
                self._matrices[record.name], payload = self._decoder.hold(source)
                self._reading[record.name] = self._reader.keep(record.name, payload)
        if on_device:
            assert self._device is not None and self._engine is not None
            self._device.load(on_device, self._engine)
        super().prepare(model)

    def _read(self, record: CodedTensor, device: torch.device) -> WeightForm:
        reading = self._reading.get(record.name)
        if reading is not None:
            reading.get()
        self._meter.add(record.name, record.source_bytes)
        return self._matrices[record.name]


def is_by_rows(record: CodedTensor) -> bool:
    """Whether the record's matrix is the weight as it is.

    It is where there are two dimensions, and scales, if any, go by rows.
    """
    by_rows = not isinstance(record, Int8Tensor) or (
        record.channel_kind == "row" and record.channel_axis == 0
    )
    return by_rows and len(record.shape) == 2


def _keeps_matrices(module: nn.Module) -> bool:
    """Whether a module's weight stays coded: where it is read only, in ways that are known."""
    changes_itself = isinstance(module, nn.Embedding) and module.max_norm is not None
    return isinstance(module, KEEPING_MODULES) and not changes_itself
