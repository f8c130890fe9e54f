"""A state dict whose values decode themselves when a model asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError
from codecllm.formats.manifest.records import AliasTensor, Int8Tensor, TensorRecord
from codecllm.loader.device.placement import concrete
from codecllm.loader.engine import Request
from codecllm.loader.reader import CPU, Content, TensorReader
from codecllm.loader.torch_tensors import DTYPE_NAMES, torch_dtype


class LazyTensor:
    """A tensor that is decoded by `to`: in transformers' loading, a slice of a safetensors file.

    transformers asks for `value[...]` and then for `.to(device=, dtype=)`. `value[...]` returns the
    object itself, so that an `int8` tensor is rounded once, directly to the parameter's dtype.

    Attributes:
        name: name of the tensor in the container.
        dtype: dtype of the tensor that `to` without arguments returns.
        shape: its dimensions.
    """

    def __init__(
        self, reader: TensorReader, record: TensorRecord, content: Content, dtype: torch.dtype
    ) -> None:
        """Describes a tensor without reading it.

        Args:
            reader: decodes it.
            record: its manifest record; an alias stands for its target.
            content: the part of the tensor.
            dtype: dtype of a float `weight` where the caller of `to` names none.
        """
        self.name = record.name
        self._reader = reader
        self._stored_name = record.alias_of if isinstance(record, AliasTensor) else record.name
        self._content = content
        self._source_dtype = torch_dtype(record.dtype, record.name)
        # Floats of 8 bits belong to a quantizer, which wants their bits.
        is_float = self._source_dtype.is_floating_point and self._source_dtype.itemsize > 1
        weight_dtype = dtype if is_float else self._source_dtype
        self.dtype = {"weight": weight_dtype, "codes": torch.int8}.get(content, torch.float32)
        self.shape = torch.Size(record.shape)
        if content in ("scale", "col_scale"):
            assert isinstance(record, Int8Tensor | AliasTensor)
            self.shape = torch.Size(record.shape[:1] if content == "scale" else record.shape[1:])
        self.ndim = len(self.shape)
        self.device = torch.device("cpu")

    @property
    def request(self) -> Request | None:
        """The request that `to` makes without arguments; None for scales."""
        if self._content == "weight":
            return Request(self._stored_name, "weight", self.dtype)
        return Request(self._stored_name, "codes") if self._content == "codes" else None

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
            dtype: its dtype; None: `self.dtype`. Codes are always int8 and scales float32.

        Raises:
            FormatError: it is damaged.
            ModelMismatchError: the model wants a float where the container holds integers, or
                the other way round.
        """
        target_dtype = self.dtype if dtype is None or self._content != "weight" else dtype
        if (
            self._content == "weight"
            and target_dtype.is_floating_point != self._source_dtype.is_floating_point
        ):
            error = ModelMismatchError(
                "dtype", tensor=self.name, got=self._source_dtype, expected=target_dtype
            )
            # transformers may swallow the exception; the load asks the reader at its end.
            self._reader.first_error = self._reader.first_error or error
            raise error
        place = CPU if device is None else concrete(torch.device(device))
        return self._reader.read(self._stored_name, self._content, target_dtype, place)


class KeptTensor(LazyTensor):
    """A tensor for another library's quantizer: in its own dtype, like a slice of the file."""

    def __init__(self, reader: TensorReader, record: TensorRecord) -> None:
        """Describes a tensor without reading it; see `LazyTensor`."""
        super().__init__(reader, record, "weight", torch_dtype(record.dtype, record.name))

    def __getitem__(self, index: Any) -> Any:
        return self.to()[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decodes the tensor, then converts it, integers to floats too; see `LazyTensor.to`."""
        tensor = super().to(device)
        return tensor if dtype is None else tensor.to(dtype)


def lazy_state_dict(
    reader: TensorReader, container: Container, dtype: torch.dtype | None
) -> dict[str, LazyTensor]:
    """Returns every tensor of a container, aliases included, as a lazy weight.

    Args:
        reader: where tensors are decoded.
        container: their container.
        dtype: dtype of floats; None keeps every tensor in its own.
    """
    records = container.manifest.tensors
    if dtype is None:
        return {record.name: KeptTensor(reader, record) for record in records}
    return {record.name: LazyTensor(reader, record, "weight", dtype) for record in records}


def prefetch(reader: TensorReader, state_dict: Mapping[str, LazyTensor]) -> None:
    """Starts to read all tensors of a state dict."""
    requests = (value.request for value in state_dict.values())
    reader.prefetch(request for request in requests if request is not None)
