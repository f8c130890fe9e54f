"""Tensors of a container by name, from the engine of the device where they are to lie."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import torch

from codecllm.formats.container import Container
from codecllm.formats.manifest.records import AliasTensor
from codecllm.loader.device.engines import DeviceEngines
from codecllm.loader.engine import Engine, Request
from codecllm.loader.host.engine import HostEngine
from codecllm.loader.progress import Meter
from codecllm.loader.promise import Awaited

CPU = torch.device("cpu")

Content = Literal["weight", "codes", "scale", "col_scale"]
"""The elements of a tensor; its int8 codes; the scales of its channels; those of its columns."""


_SharedKey = tuple[str, Content, torch.dtype | None, torch.device]


class TensorReader:
    """Reads tensors of a container by name, from any thread, and remembers the first failure.

    Tensors that stand under several names (aliases) share one storage.

    Attributes:
        first_error: the first exception that a read raised, or None.
    """

    def __init__(
        self,
        container: Container,
        threads: int,
        meter: Meter | None = None,
        devices: DeviceEngines | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Prepares reading; threads start with the first tensor.

        Args:
            container: where tensors are stored.
            threads: number of threads that decode on the CPU.
            meter: counts the bytes of weights that were read.
            devices: engines of other devices; None decodes on the CPU and then moves.
            device: where prefetched tensors will be asked for.
        """
        self._container = container
        self._host = HostEngine(container, threads)
        self._meter = meter
        self._devices = devices
        self._device = device
        self._shared_names = {
            record.alias_of
            for record in container.manifest.tensors
            if isinstance(record, AliasTensor)
        }
        self._shared: dict[_SharedKey, torch.Tensor] = {}
        self.first_error: BaseException | None = None

    def close(self) -> None:
        """Ends the prefetch; threads that still wait for a tensor get an error."""
        self._host.close()

    def prefetch(self, requests: Iterable[Request]) -> None:
        """Starts to read tensors for `device`, in the order in which transformers takes them."""
        self._engine(self._device).prefetch(
            sorted(dict.fromkeys(requests), key=lambda request: _natural_order(request.name))
        )

    def read(
        self, name: str, content: Content, dtype: torch.dtype | None, device: torch.device = CPU
    ) -> torch.Tensor:
        """Reads a stored tensor.

        Args:
            name: a tensor that is no alias.
            content: `weight`: the elements as `dtype` (None: the source's). `codes`: int8. `scale`:
                float32, one per channel; `col_scale`: float32, one per column.
            dtype: dtype of `weight`; ignored otherwise.
            device: where it is to lie.

        Raises:
            FormatError: the tensor is damaged. `first_error` keeps the first one.
        """
        try:
            if name not in self._shared_names:
                return self._read(name, content, dtype, device)
            key = name, content, dtype if content == "weight" else None, device
            if key not in self._shared:
                # Threads that come at once read twice, and all get the storage of the first.
                self._shared.setdefault(key, self._read(name, content, dtype, device))
            return self._shared[key]
        except Exception as exc:
            self.first_error = self.first_error or exc
            raise

    def keep(self, name: str, out: torch.Tensor) -> Awaited[torch.Tensor]:
        """Reads the payload of a tensor, checked, into memory of the CPU: uint8 [payload bytes]."""
        return self._host.take(Request(name, "payload", out=out))

    def _read(
        self, name: str, content: Content, dtype: torch.dtype | None, device: torch.device
    ) -> torch.Tensor:
        if content == "scale" or content == "col_scale":
            return self._read_scales(name, of_columns=content == "col_scale").to(device)
        request = Request(name, content, dtype if content == "weight" else None)
        tensor = self._engine(device).take(request).get()
        if self._meter is not None:
            self._meter.add(name, self._container.records[name].source_bytes)
        return tensor if tensor.device == device else tensor.to(device)

    def _read_scales(self, name: str, *, of_columns: bool) -> torch.Tensor:
        scales, columns = self._container.scales(name)
        if of_columns:
            assert columns is not None
            scales = columns.scales
        # A copy: the model must not refer to memory of the container.
        return torch.from_numpy(scales.copy())

    def _engine(self, device: torch.device) -> Engine:
        if self._devices is not None and self._devices.serves(device):
            return self._devices.engine(device)
        return self._host


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Returns a sort key by which layer 2 comes before layer 10, as in transformers' loading."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
