"""Error feedback whose sums, factors and rounding are on a device."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.calibrator.rounding import DeviceFactor, codes_on_device, factor_on_device
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.rate.feedback import Feedback, shrinkage
from codecllm.converter.rate.products import InputProducts, Sums
from codecllm.formats.errors import UnsupportedEnvironmentError, one_line

_GROUP_ROWS, _GROUP_ELEMENTS = 16384, 1 << 26
"""Rows and weights that are quantized at once: one row costs the columns' time, as many do."""

_PIECE = 1 << 23
"""Elements that are read at a time: the host holds no more of a tensor."""

_WORDS: dict[str, tuple[type, torch.dtype]] = {
    "BF16": (np.int16, torch.bfloat16),
    "F16": (np.int16, torch.float16),
    "F32": (np.int32, torch.float32),
}


class DeviceProducts(Sums):
    """Sums of X^T X in a device's memory."""

    def __init__(self, device: torch.device) -> None:
        """Makes the collection, empty."""
        super().__init__()
        self.device = device
        self._matrices: list[torch.Tensor] = []

    def matrix(self, number: int) -> torch.Tensor:
        """Returns a sum, float32 [cols, cols]."""
        return self._matrices[number]

    def _make_room(self, cols: int) -> None:
        # A sum that is made inside inference mode could not become a factor outside.
        with torch.inference_mode(False):
            self._matrices.append(torch.zeros((cols, cols), device=self.device))


class StagedProducts(InputProducts):
    """Sums in a file, of which those that are being added up lie in a device's memory."""

    def __init__(self, device: torch.device, room: int, folder: Path | None = None) -> None:
        """Makes the collection, empty, its file in `folder` or where temporary files are.

        Args:
            device: that of the model.
            room: bytes of the device's memory for sums.
            folder: of the file.
        """
        super().__init__(folder)
        self.room = room
        self._device = device
        self._staged: dict[int, torch.Tensor] = {}

    def settle(self) -> None:
        """Moves all sums into the file."""
        for number, total in self._staged.items():
            torch.from_numpy(super().matrix(number)).copy_(total)
        self._staged.clear()

    def matrix(self, number: int) -> Any:
        """Returns a sum, float32 [cols, cols]: on the device until it is settled."""
        if number in self._staged:
            return self._staged[number]
        return super().matrix(number)

    def _make_room(self, cols: int) -> None:
        super()._make_room(cols)
        # A sum that is made inside inference mode could not be changed outside.
        with torch.inference_mode(False):
            total = torch.zeros((cols, cols), device=self._device)
        self._staged[len(self._sums)] = total


class DeviceFeedback(Feedback):
    """Refines codes on a device. May be used by several threads; one at a time has the device."""

    def __init__(self, products: Sums, device: torch.device) -> None:
        """Takes over the sums, for good; they may lie in a file or on the device."""
        super().__init__(products)
        self._device = device
        self._turn = threading.RLock()
        self._last: tuple[int, DeviceFactor] | None = None

    def group_rows(self, cols: int) -> int:
        """As `Feedback.group_rows`."""
        return max(1, min(_GROUP_ROWS, _GROUP_ELEMENTS // cols))

    def quantize(
        self,
        plan: TensorPlan,
        params: QuantParams,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """Returns the codes of rows [start, stop), int16 on the device.

        Raises:
            UnsupportedEnvironmentError: the device has too little memory.
        """
        try:
            with self._turn:
                return self._quantize(plan, params, start, stop)
        except torch.OutOfMemoryError as exc:
            raise UnsupportedEnvironmentError(
                "the device has too little memory to refine codes; --device cpu needs none of it",
                tensor=plan.source.name,
                got=one_line(exc),
            ) from exc

    def taken(self, codes: Any, rows: slice) -> NDArray[np.int16]:
        """Returns some rows of the codes, int16 [rows, cols]."""
        with self._turn:
            result: NDArray[np.int16] = codes[rows].cpu().numpy()
        return result

    def _quantize(
        self,
        plan: TensorPlan,
        params: QuantParams,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        row_scale = self._moved(params.row_scale[start:stop])
        col_scale = None
        if params.col_scale is not None:
            col_scale = self._moved(params.col_scale)
        factor = self._factor(plan.source.name)
        return codes_on_device(
            self._read(plan, start, stop),
            (row_scale, col_scale),
            factor,
            params.deadzone,
            limits=params.limits,
        )

    def _factor(self, name: str) -> DeviceFactor:
        """Returns the factor of a tensor's inputs; the first call puts it in place of the sum."""
        number = self._products.number(name)
        # Layers with the same inputs follow one another: what came from a file is kept for them.
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        self._last = None
        place = torch.as_tensor(self._products.matrix(number))
        matrix = place.to(self._device)
        if number not in self._orders:
            shrunk = shrinkage(self._products.tokens(number))
            factor = factor_on_device(matrix, shrunk)
            matrix.copy_(factor.ratios)
            if matrix is not place:
                place.copy_(matrix)
            self._orders[number] = factor.order
        factor = DeviceFactor(self._orders[number], matrix)
        self._last = number, factor
        return factor

    def _read(
        self,
        plan: TensorPlan,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """Returns rows [start, stop) of a tensor, float32 [stop - start, cols]."""
        source = plan.source
        cols = plan.matrix[1]
        word, dtype = _WORDS[source.dtype.name]
        base = start * cols
        size = stop * cols - base
        weights = torch.empty(size, device=self._device)
        for first in range(0, size, _PIECE):
            last = min(first + _PIECE, size)
            words = source.read_elements(base + first, base + last)
            piece = torch.from_numpy(words.view(word))
            weights[first:last] = piece.to(self._device).view(dtype)
        return weights.reshape(-1, cols)

    def _moved(self, values: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
