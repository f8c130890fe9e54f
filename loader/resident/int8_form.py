"""resident="int8": codes and scales stay in memory, products use them as they are."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from codecllm.loader.resident.escapes import Escapes
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.scaled_codes import ScaledCodes


class Int8Form(WeightForm):
    """Codes and scales of a weight.

    `dense` and `gather` give the bits of dense loading, `product` see `int8_matmul`.

    Attributes:
        name: the container's name of the tensor.
        matrix: codes and scales; scales are float32 for every dtype of the weight.
    """

    kind = "int8"

    def __init__(self, name: str, matrix: ScaledCodes) -> None:
        """Keeps the tensors, not copies of them."""
        self.name, self.matrix = name, matrix
        self.shape = matrix.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and escapes."""
        return sum(tensor.nbytes for tensor in self.held_tensors().values())

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.dense`."""
        return self.matrix.dense(dtype).to(device)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.gather`."""
        return self.matrix.gather(rows.to(self.matrix.codes.device), dtype).to(device)

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `ScaledCodes.product`."""
        return self.matrix.product(inputs, bias)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """See `WeightForm.transposed_product`."""
        return self.matrix.transposed_product(grad)

    def moved(self, device: torch.device) -> WeightForm:
        """Returns codes and scales on a device."""
        if self.matrix.codes.device == device:
            return self
        held = {name: tensor.to(device) for name, tensor in self.held_tensors().items()}
        return Int8Form(self.name, _matrix_of(held, self._longest))

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns codes and scales, and the tensors of the escapes."""
        matrix = self.matrix
        held = {"codes": matrix.codes, "scale": matrix.scale}
        if matrix.col_scale is not None:
            held["col_scale"] = matrix.col_scale
        if matrix.escapes is not None:
            held |= {name: getattr(matrix.escapes, name) for name in _ESCAPE_TENSORS}
        return held

    def parts(self) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
        """Gives a compiler the codes and scales; with escapes one operation for each use.

        Code that is compiled for one layer then serves all like it.
        """
        return super().parts() if self.matrix.escapes is not None else (self.held_tensors(), ())

    @classmethod
    def from_parts(cls, tensors: dict[str, torch.Tensor], facts: tuple[Any, ...]) -> WeightForm:
        """Returns the form of these codes and scales."""
        return super().from_parts(tensors, facts) if facts else cls("", _matrix_of(tensors))

    @property
    def _longest(self) -> int:
        return 0 if self.matrix.escapes is None else self.matrix.escapes.longest

    def __reduce__(self) -> Any:
        return _restored, (self.name, self.held_tensors(), self._longest)


_ESCAPE_TENSORS = tuple(field.name for field in fields(Escapes) if field.name != "longest")


def _matrix_of(tensors: dict[str, torch.Tensor], longest: int = 0) -> ScaledCodes:
    escapes = None
    if longest:
        escapes = Escapes(**{name: tensors[name] for name in _ESCAPE_TENSORS}, longest=longest)
    return ScaledCodes(tensors["codes"], tensors["scale"], tensors.get("col_scale"), escapes)


def _restored(name: str, tensors: dict[str, torch.Tensor], longest: int) -> Int8Form:
    return Int8Form(name, _matrix_of(tensors, longest))


torch.serialization.add_safe_globals([_restored])
