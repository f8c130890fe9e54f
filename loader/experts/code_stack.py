"""Codes of a layer's experts, one behind the other, as one kernel reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from codecllm.loader.kernels.expert_codes import BYTE_BITS, ExpertCodes, ExpertPlanes
from codecllm.loader.packed.form import PackedForm
from codecllm.loader.packed.matrix import PackedMatrix
from codecllm.loader.packed.product import PackedProduct
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.joined_form import Rows, Stack
from codecllm.loader.resident.scaled_codes import ScaledCodes

Names = Sequence[Sequence[str]]
"""The container's names: of each expert those of its parts, one below the other."""


class ExpertStack(Stack):
    """A weight [n, rows, cols] in a few tensors that hold all experts.

    Its matrices are views, so that what multiplies with one of them needs no copy.

    Attributes:
        names: the container's names.
        matrix: the codes and scales of all experts.
    """

    names: Names
    matrix: ExpertCodes | ExpertPlanes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.held_tensors().values())

    def moved(self, device: torch.device) -> WeightForm:
        """Returns the stack with all tensors on a device."""
        if self.matrix.scale.device == device:
            return self
        make, (names, tensors, *facts) = self.__reduce__()
        there = {name: tensor.to(device) for name, tensor in tensors.items()}
        moved: WeightForm = make(names, there, *facts)
        return moved


class CodeStack(ExpertStack):
    """An `ExpertStack` in codes of 8 bits."""

    matrix: ExpertCodes

    def __init__(self, names: Names, matrix: ExpertCodes) -> None:
        """Keeps the tensors, not copies of them."""
        self.names, self.matrix = names, matrix
        super().__init__([_expert(names[n], matrix, n) for n in range(len(matrix.scale))])

    def held_tensors(self) -> dict[str, torch.Tensor]:
        """Returns codes, scales, and scales of columns if there are any."""
        tensors = {"codes": self.matrix.codes, "scale": self.matrix.scale}
        if self.matrix.col_scale is not None:
            tensors["col_scale"] = self.matrix.col_scale
        return tensors

    def __reduce__(self) -> Any:
        return _restored, (self.names, self.held_tensors())


def joined_codes(form: WeightForm | None) -> CodeStack | None:
    """Returns a stack with its codes in one tensor.

    Returns:
        None where it is no stack, or some codes have other sizes than 8 bits, or its matrices have
        parts of unlike rows, or scales of columns in part only.
    """
    if isinstance(form, CodeStack):
        return form
    experts = parts_of_experts(form, _has_bytes)
    if experts is None:
        return None
    parts = len(experts[0])
    has_columns = experts[0][0].matrix.col_scale is not None
    rows, cols = experts[0][0].shape
    device = experts[0][0].matrix.scale.device
    codes = torch.empty(len(experts), parts * rows, cols, dtype=torch.int8, device=device)
    scale = torch.empty(len(experts), parts * rows, dtype=torch.float32, device=device)
    col_scale = codes.new_empty(len(experts), parts, cols, dtype=torch.float32)
    for n, expert in enumerate(experts):
        for index, part in enumerate(expert):
            place = slice(index * rows, (index + 1) * rows)
            codes[n, place] = _codes_of(part)
            scale[n, place] = part.matrix.scale
            if has_columns:
                col_scale[n, index] = part.matrix.col_scale
    matrix = ExpertCodes(codes, scale, col_scale if has_columns else None)
    return CodeStack([[part.name for part in expert] for expert in experts], matrix)


def parts_of_experts(
    form: WeightForm | None, fits: Callable[[WeightForm], bool]
) -> list[list[Any]] | None:
    """Returns the matrices of each expert of a stack, one below the other.

    Args:
        form: the stack.
        fits: whether a matrix can be joined with others; it has scales then.

    Returns:
        None where it is no stack of other matrices, or one does not fit, or they have parts of
        unlike rows, or scales of columns in part only.
    """
    if not isinstance(form, Stack):
        return None
    experts = [_parts_of(member) for member in form.parts_of]
    every = [part for expert in experts for part in expert]
    if not all(map(fits, every)) or len({len(expert) for expert in experts}) != 1:
        return None
    if len({part.shape for part in every}) != 1:
        return None
    columns = [part.matrix.col_scale is not None for part in every]
    return None if any(columns) != all(columns) else experts


def _parts_of(form: WeightForm) -> list[Any]:
    return list(form.parts_of) if isinstance(form, Rows) else [form]


def _has_bytes(form: WeightForm) -> bool:
    if isinstance(form, Int8Form):
        return form.matrix.escapes is None
    if not isinstance(form, PackedForm):
        return False
    return form.matrix.bits == BYTE_BITS and form.matrix.entries is None


def _codes_of(form: Int8Form | PackedForm) -> torch.Tensor:
    if isinstance(form, Int8Form):
        return form.matrix.codes
    return unpacked_codes(form.matrix).to(torch.int8)


def unpacked_codes(matrix: PackedMatrix) -> torch.Tensor:
    """Returns codes from -256 to 256, bfloat16 [rows, cols], which holds them all.

    A kernel unpacks into it.
    """
    ones = torch.ones(matrix.rows, device=matrix.words.device)
    return PackedProduct(replace(matrix, scale=ones, col_scale=None)).dense(torch.bfloat16)


def _expert(names: Sequence[str], matrix: ExpertCodes, number: int) -> WeightForm:
    """Returns the form of one expert, of views of the stack's tensors."""
    rows = matrix.codes.shape[1] // len(names)
    parts = []
    for index, name in enumerate(names):
        place = slice(index * rows, (index + 1) * rows)
        columns = None if matrix.col_scale is None else matrix.col_scale[number, index]
        codes = ScaledCodes(matrix.codes[number, place], matrix.scale[number, place], columns)
        parts.append(Int8Form(name, codes))
    return parts[0] if len(parts) == 1 else Rows(parts)


def _restored(names: Names, tensors: dict[str, torch.Tensor]) -> CodeStack:
    matrix = ExpertCodes(tensors["codes"], tensors["scale"], tensors.get("col_scale"))
    return CodeStack(names, matrix)


torch.serialization.add_safe_globals([_restored])
