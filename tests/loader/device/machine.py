"""A device on the CPU: each call returns after its work, Triton's interpreter runs kernels.

It cannot show that a wait between streams is missing; tests/gpu runs the same on a real
device.
"""

from __future__ import annotations

import ctypes
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from codecllm.formats.container import Container
from codecllm.loader.device.codecs import NOTHING, DeviceCodecs
from codecllm.loader.device.engine import DeviceEngine
from codecllm.loader.device.nvcomp import ZstdFrames
from tests.loader.device.host_streams import HostStreams

CPU = torch.device("cpu")
KERNELS_ONLY = DeviceCodecs(kernels=True, nvcomp=None, rans=True, reasons={})


class NvcompOfTheHost:
    """Reads a batch exactly as nvCOMP does, from addresses, and decodes its frames with libzstd.

    Attributes:
        frames: how many it has decoded.
        status: the answer for every frame.
        decoded_bytes: the stated size of a decoded frame; None: the true one.
    """

    def __init__(self, status: int = 0, decoded_bytes: int | None = None) -> None:
        self.frames, self.status, self.decoded_bytes = 0, status, decoded_bytes

    def temp_bytes(self, count: int, largest: int, symbols: int) -> int:
        return 3 * symbols

    def decode(
        self, frames: ZstdFrames, temp: torch.Tensor, sizes: int, statuses: int, stream: int
    ) -> None:
        assert temp.numel() >= 3 * frames.symbols
        addresses = (frames.sources, frames.sizes, frames.raw_sizes, frames.targets)
        sources, stored, raw, targets = (
            _array(address, frames.count, ctypes.c_int64) for address in addresses
        )
        decoded, status = (
            _array(sizes, frames.count, ctypes.c_int64),
            _array(statuses, frames.count, ctypes.c_int32),
        )
        assert raw.max() == frames.largest and raw.sum() == frames.symbols
        for index in range(frames.count):
            symbols = zstandard.decompress(
                ctypes.string_at(int(sources[index]), int(stored[index]))
            )
            ctypes.memmove(int(targets[index]), symbols, int(raw[index]))
            decoded[index] = len(symbols) if self.decoded_bytes is None else self.decoded_bytes
            status[index] = self.status
        self.frames += frames.count

    def explain(self, status: int) -> str:
        return f"nvCOMP status {status}: made up"


def with_nvcomp(nvcomp: NvcompOfTheHost) -> DeviceCodecs:
    library: Any = nvcomp
    return DeviceCodecs(kernels=True, nvcomp=library, rans=True, reasons={})


@contextmanager
def engine_of(folder: Path, codecs: DeviceCodecs = NOTHING) -> Any:
    """Yields the opened container and its engine on the device that is the CPU."""
    with (
        Container(folder) as container,
        closing(DeviceEngine(container, 2, HostStreams(), codecs)) as engine,
    ):
        yield container, engine


def _array(address: int, count: int, kind: Any) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), (count,))
