"""resident="packed": the weight of a module as a packed matrix."""

from __future__ import annotations

from typing import Any

import torch

from codecllm.loader.packed.matrix import PackedMatrix
from codecllm.loader.packed.product import PackedProduct
from codecllm.loader.resident.form import WeightForm


class PackedForm(WeightForm):
    """A weight in the packed layout.

    `dense` and `gather` give the bits of dense loading; `product` see `packed.product`.

    Attributes:
        name: the container's name of the tensor.
        matrix: the packed matrix.
    """

    kind = "packed"

    def __init__(self, name: str, matrix: PackedMatrix) -> None:
        """Keeps the matrix, not a copy."""
        self.name, self.matrix = name, matrix
        self.shape = torch.Size((matrix.rows, matrix.cols))
        self._product = PackedProduct(matrix)

    @property
    def nbytes(self) -> int:
        """Bytes of planes, exceptions and scales."""
        return self.matrix.nbytes()

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.dense`."""
        return self._product.dense(dtype).to(device)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.gather`."""
        return self._product.gather(rows.to(self.matrix.words.device), dtype).to(device)

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `packed.product`."""
        return self._product.linear(inputs, bias)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """See `WeightForm.transposed_product`."""
        return grad @ self._product.dense(grad.dtype)

    def moved(self, device: torch.device) -> WeightForm:
        """Returns the form with its memory on a device."""
        if self.matrix.words.device == device:
            return self
        return PackedForm(self.name, self.matrix.to(device))

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns planes, exceptions and scales."""
        return self.matrix.tensors()

    def __reduce__(self) -> Any:
        return PackedForm, (self.name, self.matrix)


torch.serialization.add_safe_globals([PackedForm, PackedMatrix])
