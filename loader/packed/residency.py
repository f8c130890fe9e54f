"""resident="packed", and "int8" where its kernels run: tensors on their way into the layout."""

from __future__ import annotations

import torch

from codecllm.formats.manifest.records import CodedTensor, Int8Tensor, LosslessTensor
from codecllm.loader.engine import Request
from codecllm.loader.packed.form import PackedForm
from codecllm.loader.packed.kernels import has_kernels
from codecllm.loader.packed.matrix import PackedMatrix, can_pack, pack_bf16, pack_codes
from codecllm.loader.resident.form import WeightForm
from codecllm.loader.resident.residency import Residency, ResidentInt8

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
        if isinstance(record, LosslessTensor):
            weights = self._reader.read(record.name, "weight", torch.bfloat16, device)
            matrix = pack_bf16(weights)
        else:
            matrix = self._pack_codes(record, device)
        return None if matrix is None else PackedForm(record.name, matrix)

    def _pack_codes(self, record: CodedTensor, device: torch.device) -> PackedMatrix | None:
        assert isinstance(record, Int8Tensor)
        if not record.wide:
            codes = self._reader.read(record.name, "codes", None, device)
            return pack_codes(codes, *self._scales(record, device))
        # The weight is fl32(code * step) with a code of 16 bits: the quotient is off by far less
        # than a half.
        scale, columns = self._scales(record, device)
        weights = self._reader.read(record.name, "weight", torch.float32, device)
        steps = scale[:, None] if columns is None else scale[:, None] * columns
        return pack_codes((weights / steps).round_().to(torch.int16), scale, columns)


class ResidentBytes(ResidentInt8):
    """resident="int8": on a device with the packed kernels, codes lie in the layout of 8 bits.

    These kernels take less host time a product than those of `int8_linear`, and less time for long
    prompts. Elsewhere codes lie as `ResidentInt8` holds them.
    """

    def _read(self, record: CodedTensor, device: torch.device) -> WeightForm | None:
        if not (has_kernels(device) and can_pack(*record.shape)):
            return super()._read(record, device)
        codes = self._reader.read(record.name, "codes", None, device)
        matrix = pack_codes(codes, *self._scales(record, device), _BYTE_BITS)
        return None if matrix is None else PackedForm(record.name, matrix)
