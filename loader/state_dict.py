"""A state dict whose values decode themselves when a model asks for them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, TensorRecord
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.device.feed import DeviceFeeds, concrete
from codecllm.loader.host.memory import SlabMemory, touch
from codecllm.loader.host.pool import DecodePool
from codecllm.loader.host.read_ahead import ReadAhead, Request
from codecllm.loader.progress import Meter
from codecllm.loader.torch_tensors import (
    DTYPE_NAMES,
    Announcer,
    Filling,
    file_order,
    is_model_float,
    open_scales,
    start_filling,
    start_filling_codes,
    torch_dtype,
)

Part = Literal["weight", "codes", "scale", "col_scale"]
CPU = torch.device("cpu")

Wanted = tuple[str, Part, torch.dtype | None]
"""Name of a stored tensor, what of it, and as which dtype."""


class TensorReader:
    """Decodes single tensors of a container on request, from any thread, and remembers the first failure.

    Tensors that are asked for under several names (aliases, tied modules) are decoded once and share one storage. What `expect`
    was told of is decoded before it is asked for.

    Attributes:
        first_error: the first exception that a read raised, or None.
    """

    def __init__(
        self,
        container: Container,
        pool: DecodePool,
        meter: Meter | None = None,
        feeds: DeviceFeeds | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Prepares reading.

        Args:
            container: where tensors are stored.
            pool: decodes on the CPU, and reads for devices.
            meter: counts what was read.
            feeds: where tensors for other devices come from; None: decoded on the CPU and then moved.
            device: where what `expect` is told of will be asked for.
        """
        self._container = container
        self._feeds, self._device = feeds, device
        self._ahead = ReadAhead(pool, takers_help=True)
        self._memory = SlabMemory()
        self._announce = Announcer()
        self._meter = meter
        self._lock = threading.Lock()
        self._expected: dict[tuple[str, Part], torch.dtype] = {}
        self._scales: dict[str, torch.Tensor] = {}
        self._shared_locks: dict[str, threading.Lock] = {}
        self._shared: dict[tuple[str, Part, torch.dtype | None, torch.device], torch.Tensor] = {}
        self.first_error: BaseException | None = None
        for record in container.manifest.tensors:
            if isinstance(record, AliasTensor):
                self.share(record.alias_of)

    def close(self) -> None:
        """Ends the reading ahead; whoever still waits for a tensor gets an error."""
        self._ahead.close()

    def share(self, name: str) -> None:
        """Keeps the tensor `name` once it was decoded, so that later requests get the same storage."""
        with self._lock:
            self._shared_locks.setdefault(name, threading.Lock())

    def expect(self, wanted: Iterable[Wanted]) -> None:
        """Starts to decode what will be asked for, in the order of the files; call once. See `read` for the arguments."""
        place = {name: number for number, name in enumerate(file_order(self._container))}
        unique = {
            (name, part): self._dtype(name, part, dtype)
            for name, part, dtype in wanted
            if part in ("weight", "codes")
        }
        keys = sorted(unique, key=lambda key: place[key[0]])
        if self._feeds is not None and self._feeds.serves(self._device):
            self._feeds.feed(self._device).expect(
                (name, part, unique[name, part]) for name, part in keys
            )
            return
        self._expected = {(name, part): dtype for (name, part), dtype in unique.items()}
        self._memory.note()
        requests = [self._request(name, part, self._expected[name, part]) for name, part in keys]
        self._ahead.expect(requests, prepare=lambda: touch(self._memory.noted()))

    def read(
        self, name: str, part: Part, dtype: torch.dtype | None, device: torch.device = CPU
    ) -> torch.Tensor:
        """Decodes a stored tensor.

        Args:
            name: a tensor that is no alias.
            part: `weight`: the elements as `dtype` (None: the source's). `codes`: int8. `scale`: float32, one per channel;
                `col_scale`: float32, one per column.
            dtype: dtype of `weight`; ignored otherwise.
            device: where it is to lie.

        Raises:
            FormatError: the tensor is damaged. `first_error` keeps the first one.
        """
        try:
            lock = self._shared_locks.get(name)
            if lock is None:
                return self._take(name, part, dtype, device)
            with lock:
                key = (name, part, dtype if part == "weight" else None, device)
                if key not in self._shared:
                    self._shared[key] = self._take(name, part, dtype, device)
                return self._shared[key]
        except BaseException as exc:
            with self._lock:
                self.first_error = self.first_error or exc
            raise

    def keep(self, name: str, filling: Filling) -> Request:
        """Reads the payload of a tensor into memory where it stays; returns what `kept` waits for."""
        return self._ahead.take(Request((name, "payload"), filling.tensor.nbytes, lambda: filling))

    def kept(self, payload: Request) -> torch.Tensor:
        """Returns a payload once all of it is read and checked; raises FormatError where it is damaged."""
        return self._ahead.result(payload)

    def _take(
        self, name: str, part: Part, dtype: torch.dtype | None, device: torch.device
    ) -> torch.Tensor:
        if part == "scale" or part == "col_scale":
            held = self._scales.pop(name, None) if part == "scale" else None
            return (
                held
                if held is not None
                else open_scales(self._container, name, of_columns=part == "col_scale")
            ).to(device)
        dtype = self._dtype(name, part, dtype)
        if self._feeds is not None and self._feeds.serves(device):
            return self._feeds.feed(device).take(name, part, dtype)
        if self._expected.get((name, part), dtype) != dtype:
            self._ahead.drop((name, part))
        tensor = self._ahead.result(self._ahead.take(self._request(name, part, dtype)))
        if self._meter is not None:
            self._meter.add(name, self._container.records[name].source_bytes)
        return tensor if device == CPU else tensor.to(device)

    def _dtype(self, name: str, part: Part, dtype: torch.dtype | None) -> torch.dtype:
        return (
            torch.int8
            if part == "codes"
            else dtype or torch_dtype(self._container.records[name].dtype, name)
        )

    def _request(self, name: str, part: Part, dtype: torch.dtype) -> Request:
        def start() -> Filling:
            source = self._container.tensor(name)
            self._announce(source)
            if part == "weight":
                return start_filling(source, dtype, self._memory.empty_bytes)
            assert isinstance(source, StoredTensor) and source.scales is not None
            self._scales[name] = torch.from_numpy(source.scales.copy())  # will be asked for next
            return start_filling_codes(source, self._memory.empty_bytes)

        return Request((name, part), self._container.records[name].elements * dtype.itemsize, start)


class LazyTensor:
    """A tensor that is decoded by `to`; stands in for a slice of a safetensors file in transformers' loading.

    transformers asks for `value[...]` and then `.to(device=, dtype=)` in a thread of its own. `value[...]` therefore returns
    the object itself, so that an `int8` tensor is rounded once, directly to the dtype that the parameter wants.
    """

    def __init__(
        self, reader: TensorReader, record: TensorRecord, part: Part, dtype: torch.dtype
    ) -> None:
        """Describes a tensor without reading it.

        Args:
            reader: where it is decoded.
            record: its manifest record; an alias stands for its target.
            part: what of it.
            dtype: dtype of a float `weight` where the caller of `to` names none.
        """
        self.name = record.name
        self._reader = reader
        self._stored_name = record.alias_of if isinstance(record, AliasTensor) else record.name
        self._part = part
        self._source_dtype = torch_dtype(record.dtype, record.name)
        is_float = self._source_dtype.is_floating_point and self._source_dtype.itemsize > 1
        weight_dtype = dtype if is_float else self._source_dtype
        self.dtype = {"weight": weight_dtype, "codes": torch.int8}.get(part, torch.float32)
        self.shape = torch.Size(record.shape)
        if part in ("scale", "col_scale"):
            assert isinstance(record, Int8Tensor | AliasTensor)
            self.shape = torch.Size(record.shape[:1] if part == "scale" else record.shape[1:])
        self.ndim = len(self.shape)
        self.device = torch.device("cpu")

    @property
    def wanted(self) -> Wanted:
        """What `to` without arguments reads: arguments of `TensorReader.expect`."""
        return self._stored_name, self._part, self.dtype

    def get_shape(self) -> list[int]:
        """Dimensions, as a safetensors slice gives them."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Dtype in safetensors' spelling."""
        return DTYPE_NAMES[self.dtype]

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether `dtype` is a float."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.to()[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decodes the tensor.

        Args:
            device: where it is to lie; None: the CPU.
            dtype: its dtype; None: `self.dtype`. Codes are int8 and scales float32 whatever is asked for.

        Raises:
            FormatError: it is damaged.
            ModelMismatchError: the model wants a float where the container holds integers, or the other way round.
        """
        wanted = self.dtype if dtype is None or self._part != "weight" else dtype
        if (
            self._part == "weight"
            and wanted.is_floating_point != self._source_dtype.is_floating_point
        ):
            error = ModelMismatchError(
                "dtype", tensor=self.name, got=self._source_dtype, expected=wanted
            )
            self._reader.first_error = self._reader.first_error or error
            raise error
        place = CPU if device is None else concrete(torch.device(device))
        return self._reader.read(self._stored_name, self._part, wanted, place)


def lazy_state_dict(
    reader: TensorReader, container: Container, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """Returns every tensor of a container, aliases included, as a lazy weight."""
    return {
        record.name: LazyTensor(reader, record, "weight", dtype)
        for record in container.manifest.tensors
    }


def main_dtype(container: Container) -> torch.dtype:
    """Returns the float dtype that most weights of the source have; float32 where it has none."""
    counts: Counter[str] = Counter()
    for record in container.manifest.tensors:
        if is_model_float(record.dtype):
            counts[record.dtype] += record.elements
    return torch_dtype(counts.most_common(1)[0][0]) if counts else torch.float32
