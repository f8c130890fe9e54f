"""resident="int8": codes and scales stay in memory, products use them as they are."""

from __future__ import annotations

from typing import Any

import torch

from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.int8_matmul import (
    dequantize_rows,
    int8_product,
    transposed_product,
)


class Int8Form(WeightForm):
    """Codes and scales of a weight.

    `dense` and `gather` give the bits of dense loading, `product` see `int8_matmul`.

    Attributes:
        name: the container's name of the tensor.
        codes: int8 [rows, cols].
        scale: float32 [rows], of every dtype of the weight.
        col_scale: float32 [cols] likewise, or None where columns have no scales.
    """

    kind = "int8"

    def __init__(
        self,
        name: str,
        codes: torch.Tensor,
        scale: torch.Tensor,
        col_scale: torch.Tensor | None = None,
    ) -> None:
        """Keeps the tensors, not copies of them."""
        self.name = name
        self.codes, self.scale, self.col_scale = codes, scale, col_scale
        self.shape = codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(tensor.nbytes for tensor in self.held_tensors().values())

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.dense`."""
        return dequantize_rows(self.codes, self.scale, dtype, self.col_scale).to(device)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.gather`."""
        places = rows.to(self.codes.device)
        codes, scale = self.codes.index_select(0, places), self.scale.index_select(0, places)
        return dequantize_rows(codes, scale, dtype, self.col_scale).to(device)

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `int8_matmul.int8_product`."""
        return int8_product(inputs, self.codes, self.scale, bias, self.col_scale)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """See `WeightForm.transposed_product`."""
        return transposed_product(grad, self.codes, self.scale, self.col_scale)

    def moved(self, device: torch.device) -> WeightForm:
        """Returns codes and scales on a device."""
        if self.codes.device == device:
            return self
        columns = None if self.col_scale is None else self.col_scale.to(device)
        return Int8Form(self.name, self.codes.to(device), self.scale.to(device), columns)

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns codes and scales."""
        held = {"codes": self.codes, "scale": self.scale}
        return held if self.col_scale is None else {**held, "col_scale": self.col_scale}

    def parts(self) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
        """Gives a compiler the codes and scales.

        Code that is compiled for one layer then serves all like it.
        """
        return self.held_tensors(), ()

    @classmethod
    def from_parts(cls, tensors: dict[str, torch.Tensor], facts: tuple[Any, ...]) -> WeightForm:
        """Returns the form of these codes and scales."""
        return cls("", tensors["codes"], tensors["scale"], tensors.get("col_scale"))

    def __reduce__(self) -> Any:
        return Int8Form, (self.name, self.codes, self.scale, self.col_scale)


torch.serialization.add_safe_globals([Int8Form])
