"""Weights that transformers joins from several tensors of a checkpoint.

The parts stay in their own forms. A product with one expert touches the parts of that expert only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from codecllm.loader.resident.form import WeightForm


class _Joined(WeightForm):
    """Several forms that are one weight.

    Attributes:
        parts_of: the forms, in order.
    """

    def __init__(self, parts_of: Sequence[WeightForm]) -> None:
        """Keeps the forms; there is at least one."""
        self.parts_of = list(parts_of)
        self.name = self.parts_of[0].name

    @property
    def kind(self) -> str:  # type: ignore[override]  # that of the parts
        """Name of the residency of the parts."""
        return self.parts_of[0].kind

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts_of)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.gather`; the whole weight is decoded."""
        return self.dense(dtype, device).index_select(0, rows.to(device))

    def moved(self, device: torch.device) -> WeightForm:
        """Returns the weight with all parts on a device."""
        return type(self)([part.moved(device) for part in self.parts_of])

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of all parts."""
        return {
            f"part{number}_{name}": tensor
            for number, part in enumerate(self.parts_of)
            for name, tensor in part.held_tensors().items()
        }

    def __reduce__(self) -> Any:
        return type(self), (self.parts_of,)


class Rows(_Joined):
    """A weight whose rows are those of its parts, one part below the other."""

    def __init__(self, parts_of: Sequence[WeightForm]) -> None:
        """Keeps the forms, each [rows, cols] with as many columns."""
        super().__init__(parts_of)
        self._sizes = [part.shape[0] for part in self.parts_of]
        self.shape = torch.Size((sum(self._sizes), self.parts_of[0].shape[1]))

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.dense`."""
        return torch.cat([part.dense(dtype, device) for part in self.parts_of])

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `WeightForm.product`."""
        biases = [None] * len(self._sizes) if bias is None else bias.split(self._sizes)
        products = [
            part.product(inputs, one) for part, one in zip(self.parts_of, biases, strict=True)
        ]
        return torch.cat(products, -1)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """See `WeightForm.transposed_product`."""
        grads = grad.split(self._sizes, -1)
        products = [
            part.transposed_product(one.contiguous())
            for part, one in zip(self.parts_of, grads, strict=True)
        ]
        return torch.stack(products).sum(0)


class Stack(_Joined):
    """A weight [n, rows, cols] of n matrices: the experts of a layer."""

    def __init__(self, parts_of: Sequence[WeightForm]) -> None:
        """Keeps the forms, all of one shape [rows, cols]."""
        super().__init__(parts_of)
        self.shape = torch.Size((len(self.parts_of), *self.parts_of[0].shape))

    def member(self, number: int) -> WeightForm:
        """See `WeightForm.member`."""
        return self.parts_of[number]

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.dense`."""
        return torch.stack([part.dense(dtype, device) for part in self.parts_of])

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns what torch makes of a product with three dimensions: mostly an error."""
        return functional.linear(inputs, self.dense(inputs.dtype, inputs.device), bias)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """See `product`."""
        return grad @ self.dense(grad.dtype, grad.device)


def stacked(forms: Sequence[WeightForm]) -> WeightForm | None:
    """Returns matrices as one weight [n, rows, cols]; None where their shapes differ."""
    shapes = {form.shape for form in forms}
    return Stack(forms) if len(shapes) == 1 and len(forms[0].shape) == 2 else None


def concatenated(forms: Sequence[WeightForm], dim: int) -> WeightForm | None:
    """Returns weights joined along their rows, or None where they do not fit or `dim` is another.

    Args:
        forms: matrices with as many columns, or stacks of as many such matrices.
        dim: the dimension of rows: 0 of matrices, 1 of stacks; negative ones count from the end.
    """
    rank = len(forms[0].shape)
    if (dim % rank) != rank - 2 or any(len(form.shape) != rank for form in forms):
        return None
    if len({(form.shape[:-2], form.shape[-1]) for form in forms}) != 1:
        return None
    if rank == 2:
        return Rows(forms)
    return Stack([_rows_of(forms, number) for number in range(forms[0].shape[0])])


def _rows_of(stacks: Sequence[WeightForm], number: int) -> WeightForm:
    members = [stack.member(number) for stack in stacks]
    return Rows([member for member in members if member is not None])


torch.serialization.add_safe_globals([Rows, Stack])
