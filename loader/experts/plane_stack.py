"""Codes of a layer's experts in fewer bits than 8, or with codes beyond, for one kernel."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional

from codecllm.loader.experts.code_stack import (
    ExpertStack,
    Names,
    parts_of_experts,
    unpacked_codes,
)
from codecllm.loader.experts.planes import choose_bits, codes_of_expert, pack_experts
from codecllm.loader.kernels.expert_codes import EXACT, Entries, ExpertPlanes
from codecllm.loader.packed.form import PackedForm
from codecllm.loader.packed.matrix import unpack_codes
from codecllm.loader.resident.escapes import Escapes
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.joined_form import Rows

_MOST = 1 << 16
"""Most rows and columns: an exception has 16 bits for each."""

_COL_UNIT = 32
"""Columns must be a multiple of this: a kernel reads planes by words of 32 bits."""


class PlaneForm(WeightForm):
    """One matrix of a `PlaneStack`.

    Attributes:
        name: the container's name of the tensor.
        number: of the expert.
        part: of its matrices, one below the other.
    """

    kind = "packed"

    def __init__(self, name: str, matrix: ExpertPlanes, number: int, part: int, parts: int) -> None:
        """Keeps the tensors of all experts, not copies of them."""
        self.name, self.number, self.part = name, number, part
        self._matrix, self._parts = matrix, parts
        self.shape = torch.Size((matrix.scale.shape[1] // parts, matrix.cols))

    @property
    def nbytes(self) -> int:
        """Bytes of its share of the stack."""
        matrix = self._matrix
        return _nbytes(matrix) // (len(matrix.scale) * self._parts)

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.dense`."""
        matrix = self._matrix
        rows = slice(self.part * self.shape[0], (self.part + 1) * self.shape[0])
        codes = codes_of_expert(matrix, self.number)[rows]
        steps = matrix.scale[self.number, rows, None]
        if matrix.col_scale is not None:
            steps = steps * matrix.col_scale[self.number, self.part]
        return (codes.to(torch.float32) * steps).to(dtype).to(device)

    def gather(self, rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `WeightForm.gather`; the whole weight is decoded."""
        return self.dense(dtype, device).index_select(0, rows.to(device))

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `WeightForm.product`; the bits of a dense layer."""
        return functional.linear(inputs, self.dense(inputs.dtype, inputs.device), bias)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """See `WeightForm.transposed_product`."""
        return grad @ self.dense(grad.dtype, grad.device)

    def moved(self, device: torch.device) -> WeightForm:
        """Returns the form with the memory of all experts on a device."""
        if self._matrix.scale.device == device:
            return self
        matrix = _matrix_of(
            {name: tensor.to(device) for name, tensor in self.held_tensors().items()},
            self._matrix.bits,
        )
        return PlaneForm(self.name, matrix, self.number, self.part, self._parts)

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of all experts."""
        return _tensors_of(self._matrix)

    def __reduce__(self) -> Any:
        place = (self.number, self.part, self._parts)
        return _restored_form, (self.name, self.held_tensors(), self._matrix.bits, *place)


class PlaneStack(ExpertStack):
    """An `ExpertStack` in codes of 2 to 8 bits with exceptions."""

    matrix: ExpertPlanes

    def __init__(self, names: Names, matrix: ExpertPlanes) -> None:
        """Keeps the tensors, not copies of them."""
        self.names, self.matrix = names, matrix
        super().__init__([_expert(names[n], matrix, n) for n in range(len(matrix.scale))])

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns planes, exceptions and scales."""
        return _tensors_of(self.matrix)

    def __reduce__(self) -> Any:
        return _restored, (self.names, self.held_tensors(), self.matrix.bits)


def joined_planes(form: WeightForm | None) -> PlaneStack | None:
    """Returns a stack of coded matrices as one of planes.

    Returns:
        None where it is no stack, or holds other matrices than codes, or its matrices have parts of
        unlike rows, or scales of columns in part only.
    """
    if isinstance(form, PlaneStack):
        return form
    experts = parts_of_experts(form, _has_codes)
    if experts is None:
        return None
    rows, cols = experts[0][0].shape
    if max(rows * len(experts[0]), cols) > _MOST or cols % _COL_UNIT:
        return None
    scale = torch.stack([torch.cat([part.matrix.scale for part in expert]) for expert in experts])
    columns = None
    if experts[0][0].matrix.col_scale is not None:
        columns = torch.stack(
            [torch.stack([part.matrix.col_scale for part in expert]) for expert in experts]
        )

    def codes(number: int) -> torch.Tensor:
        return torch.cat([_exact_codes(part) for part in experts[number]])

    bits = choose_bits(codes, scale, cols)
    matrix = pack_experts(codes, scale, columns, cols, bits)
    return PlaneStack([[part.name for part in expert] for expert in experts], matrix)


def _has_codes(form: WeightForm) -> bool:
    return isinstance(form, Int8Form) or (isinstance(form, PackedForm) and not form.matrix.is_bf16)


def _exact_codes(form: Any) -> torch.Tensor:
    """Returns the codes, int16 [rows, cols]."""
    if isinstance(form, Int8Form):
        codes = form.matrix.codes.to(torch.int16)
        escapes: Escapes | None = form.matrix.escapes
        if escapes is not None:
            at = (escapes.row_numbers(), escapes.column.to(torch.int64))
            codes[at] += escapes.extra.to(torch.int16)
        return codes
    matrix = form.matrix
    if matrix.entries is not None and int((matrix.entries >> 16).abs().max()) > EXACT:
        return unpack_codes(matrix)
    return unpacked_codes(matrix).to(torch.int16)


_PLANES = ("plane0", "plane1", "plane2")
_ENTRIES = tuple(field.name for field in fields(Entries))


def _expert(names: Any, matrix: ExpertPlanes, number: int) -> WeightForm:
    parts = [PlaneForm(name, matrix, number, part, len(names)) for part, name in enumerate(names)]
    return parts[0] if len(parts) == 1 else Rows(parts)


def _tensors_of(matrix: ExpertPlanes) -> dict[str, torch.Tensor]:
    tensors = dict(zip(_PLANES, matrix.planes, strict=False)) | {"scale": matrix.scale}
    if matrix.col_scale is not None:
        tensors["col_scale"] = matrix.col_scale
    for kind in ("near", "wide"):
        entries = getattr(matrix, kind)
        if entries is not None:
            tensors |= {f"{kind}_{name}": getattr(entries, name) for name in _ENTRIES}
    return tensors


def _nbytes(matrix: ExpertPlanes) -> int:
    return sum(tensor.nbytes for tensor in _tensors_of(matrix).values())


def _matrix_of(tensors: dict[str, torch.Tensor], bits: int) -> ExpertPlanes:
    planes = tuple(tensors[name] for name in _PLANES if name in tensors)
    near, wide = (
        Entries(*(tensors[f"{kind}_{name}"] for name in _ENTRIES))
        if f"{kind}_bounds" in tensors
        else None
        for kind in ("near", "wide")
    )
    return ExpertPlanes(bits, planes, tensors["scale"], tensors.get("col_scale"), near, wide)


def _restored(names: Names, tensors: dict[str, torch.Tensor], bits: int) -> PlaneStack:
    return PlaneStack(names, _matrix_of(tensors, bits))


def _restored_form(
    name: str, tensors: dict[str, torch.Tensor], bits: int, number: int, part: int, parts: int
) -> PlaneForm:
    return PlaneForm(name, _matrix_of(tensors, bits), number, part, parts)


torch.serialization.add_safe_globals([_restored, _restored_form])
