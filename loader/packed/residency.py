"""resident="packed", and "int8" where its kernels run: tensors on their way into the layout."""

from __future__ import annotations

import torch

from codecllm.formats.manifest.records import CodedTensor, Int8Tensor, LosslessTensor
from codecllm.loader.engine import Request
from codecllm.loader.experts.forward import will_be_joined
from codecllm.loader.packed.form import PackedForm
from codecllm.loader.packed.kernels import has_kernels
from codecllm.loader.packed.matrix import (
    PackedMatrix,
    can_pack,
    choose_bits,
    pack_bf16,
    pack_codes,
)
from codecllm.loader.resident.escapes import split_codes
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.residency import Residency, ResidentInt8
from codecllm.loader.resident.scaled_codes import ScaledCodes

_BYTE_BITS = 8


class ResidentPacked(Residency):
    """Codes of int8 tensors, and bfloat16 weights of lossless ones, stay in memory at a fixed rate.

    Each tensor is decoded and packed on its device, one at a time: there is no dense copy of the
    model. A tensor without a packed form (`can_pack`, or too many exceptions) is loaded dense.
    """

    takes = (
        "resident='packed' needs matrices of scheme int8, or lossless ones of BF16, whose columns "
        "are a multiple of 16"
    )

    def can_take(self, record: CodedTensor) -> bool:
        """Whether it has a packed form."""
        if len(record.shape) != 2 or not can_pack(*record.shape):
            return False
        return isinstance(record, Int8Tensor) or record.dtype == "BF16"

    def request(self, record: CodedTensor) -> Request | None:
        """Returns that of the codes or weights that are packed."""
        if isinstance(record, LosslessTensor):
            return Request(record.name, "weight", torch.bfloat16)
        if isinstance(record, Int8Tensor) and record.wide:
            return Request(record.name, "weight", torch.float32)
        return Request(record.name, "codes")

    def _read(self, record: CodedTensor, device: torch.device) -> WeightForm | None:
        matrix: PackedMatrix | None
        if isinstance(record, LosslessTensor):
            weights = self._reader.read(record.name, "weight", torch.bfloat16, device)
            matrix = pack_bf16(weights)
        else:
            assert isinstance(record, Int8Tensor)
            codes = self._codes(record, device)
            scale, columns = self._scales(record, device)
            if will_be_joined(record.name, device) and choose_bits(codes) == _BYTE_BITS:
                narrow = split_codes(codes)
                if narrow is not None and narrow[1] is None:
                    return Int8Form(record.name, ScaledCodes(narrow[0], scale, columns))
            matrix = pack_codes(codes, scale, columns)
        return None if matrix is None else PackedForm(record.name, matrix)

    def _codes(self, record: Int8Tensor, device: torch.device) -> torch.Tensor:
        if not record.wide:
            return self._reader.read(record.name, "codes", None, device)
        # The weight is fl32(code * step) with a code of 16 bits: the quotient is off by far less
        # than a half.
        scale, columns = self._scales(record, device)
        weights = self._reader.read(record.name, "weight", torch.float32, device)
        steps = scale[:, None] if columns is None else scale[:, None] * columns
        return (weights / steps).round_().to(torch.int16)


class ResidentBytes(ResidentInt8):
    """resident="int8": on a device with the packed kernels, codes lie in the layout of 8 bits.

    These kernels take less host time a product than those of `int8_linear`, and less time for long
    prompts. Elsewhere codes lie as `ResidentInt8` holds them, and so do those of experts, which are
    joined later.
    """

    def _read(self, record: CodedTensor, device: torch.device) -> WeightForm | None:
        packs = has_kernels(device) and can_pack(*record.shape)
        if not packs or will_be_joined(record.name, device):
            return super()._read(record, device)
        codes = self._reader.read(record.name, "codes", None, device)
        matrix = pack_codes(codes, *self._scales(record, device), _BYTE_BITS)
        return None if matrix is None else PackedForm(record.name, matrix)
