"""Which decoders this machine has for a device, why not others, and their calls."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from codecllm.formats.codecs import CODEC_IDS, CODEC_NAMES, RANS_ID
from codecllm.formats.container import Container
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.formats.manifest.records import AliasTensor, RawTensor
from codecllm.loader.device.nvcomp import Nvcomp, ZstdFrames, open_nvcomp
from codecllm.loader.device.streams import Event, Streams, is_accelerator

if TYPE_CHECKING:
    from codecllm.loader.kernels.rans import DeviceTables

Decoder = Literal["auto", "cpu", "nvcomp", "triton"]
"""Where chunks are decoded for a model on a GPU.

auto: zstd by nvCOMP and `rans` by our kernel where they work, the rest on the CPU. cpu: everything
on the CPU. nvcomp and triton: as auto, but an error where that one does not work here or has
nothing to decode in this container.
"""

RAW_ID = CODEC_IDS["raw"]
ZSTD_ID = CODEC_IDS["zstd"]
_DECODES = {"nvcomp": ZSTD_ID, "triton": RANS_ID}
MIN_TRITON_CAPABILITY = (7, 5)


@dataclass(frozen=True, slots=True)
class DeviceCodecs:
    """The codecs that are decoded on a device; all others are on the CPU.

    Attributes:
        kernels: whether our kernels run there: without them nothing is decoded there.
        nvcomp: the library that decodes zstd there, or None.
        rans: whether `rans` is decoded there.
        reasons: decoder -> why it does not work here; only for those that do not.
    """

    kernels: bool
    nvcomp: Nvcomp | None
    rans: bool
    reasons: dict[str, str]

    def decodes(self, codec: int) -> bool:
        """Whether chunks of a codec are decoded on the device."""
        able = {RAW_ID: True, RANS_ID: self.rans, ZSTD_ID: self.nvcomp is not None}
        return self.kernels and able.get(codec, False)


NOTHING = DeviceCodecs(False, None, False, {})
"""Everything is decoded on the CPU."""


def find_codecs(device: torch.device) -> DeviceCodecs:
    """Tries every decoder for a device; `reasons` has those that do not work."""
    reasons: dict[str, str] = {}
    without_kernels = why_no_kernels(device)
    if without_kernels is not None:
        reasons["triton"] = without_kernels
        # nvCOMP gives symbols; only kernels make elements of them.
        reasons["nvcomp"] = f"its output needs the kernels: {without_kernels}"
        return DeviceCodecs(False, None, False, reasons)
    nvcomp = None
    try:
        nvcomp = open_nvcomp(device)
    except UnsupportedEnvironmentError as exc:
        reasons["nvcomp"] = str(exc)
    return DeviceCodecs(True, nvcomp, True, reasons)


def why_no_kernels(device: torch.device) -> str | None:
    """Returns why Triton's kernels cannot run on a device, or None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'codecllm[triton]'"
    if is_accelerator(device) and not getattr(torch, device.type).is_available():
        return f"torch finds no device of type {device.type}"
    # ROCm's devices are called cuda too, and their capability is on another scale.
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_TRITON_CAPABILITY:
            version = ".".join(map(str, capability))
            return f"Triton needs compute capability 7.5 or more, this GPU has {version}"
    if not is_accelerator(device):
        return _why_not_interpreted()
    return None


def choose_codecs(decoder: Decoder, device: torch.device, container: Container) -> DeviceCodecs:
    """Returns the decoders for a load.

    Raises:
        UnsupportedEnvironmentError: the decoder that was asked for by name does not work here.
        UsageError: it has nothing to decode in this container.
    """
    if decoder == "cpu":
        return NOTHING
    device_codecs = find_codecs(device)
    if decoder == "auto":
        return device_codecs
    reason = device_codecs.reasons.get(decoder)
    if reason is not None:
        raise UnsupportedEnvironmentError(f"decoder {decoder!r} does not work here: {reason}")
    stored_codecs = codecs_of(container)
    # A decoder by name is a wish to measure or test it: doing nothing would mislead.
    if _DECODES[decoder] not in stored_codecs:
        names = ", ".join(sorted(CODEC_NAMES[codec] for codec in stored_codecs)) or "none"
        raise UsageError(
            f"decoder {decoder!r} has nothing to decode",
            got=f"codecs {names}",
            expected=CODEC_NAMES[_DECODES[decoder]],
        )
    return device_codecs


def codecs_of(container: Container) -> set[int]:
    """Returns the ids of the codecs that a container's planes name in its manifest."""
    coded_records = [
        record
        for record in container.manifest.tensors
        if not isinstance(record, RawTensor | AliasTensor)
    ]
    return {CODEC_IDS[plane.codec] for record in coded_records for plane in record.planes}


def _why_not_interpreted() -> str | None:
    from triton import knobs

    return None if knobs.runtime.interpret else "there is no GPU"


class DeviceTools:
    """Decoders of a device with the scratch that they need.

    Attributes:
        streams: the device's.
        codecs: the codecs that are decoded there.
    """

    def __init__(self, streams: Streams, codecs: DeviceCodecs) -> None:
        """Allocates nothing yet."""
        self.streams = streams
        self.codecs = codecs
        self._temp = torch.empty(0, dtype=torch.uint8)

    def expand(
        self, tables: tuple[NDArray[np.int64], NDArray[np.int64]]
    ) -> tuple[DeviceTables, Event] | None:
        """Copies tables to the device on the side stream, which has no other work to wait for.

        Args:
            tables: int64 [tables] precisions, and int64 [tables, 256] frequencies.
        """
        precisions, frequencies = tables
        if not len(precisions):
            return None
        from codecllm.loader.kernels.rans import expand_frequencies

        # The decode stream is busy with the batch before, and this copy is waited for.
        with self.streams.on(self.streams.side):
            device_tables = expand_frequencies(precisions, frequencies, self.streams.device)
        for part in (device_tables.symbols, device_tables.ranges, device_tables.precisions):
            self.streams.keep(part, self.streams.decode)
        return device_tables, self.streams.record(self.streams.side)

    def decode_zstd(self, frames: ZstdFrames, sizes: torch.Tensor, statuses: torch.Tensor) -> None:
        """Queues the decoding of frames on the decode stream; see `Nvcomp.decode`."""
        nvcomp = self.codecs.nvcomp
        assert nvcomp is not None
        temp_bytes = nvcomp.temp_bytes(frames.count, frames.largest, frames.symbols)
        if self._temp.numel() < temp_bytes:
            self._temp = torch.empty(temp_bytes, dtype=torch.uint8, device=self.streams.device)
        stream = self.streams.handle(self.streams.decode)
        nvcomp.decode(frames, self._temp, sizes.data_ptr(), statuses.data_ptr(), stream)

    def explain_zstd(self, status: int) -> str:
        """Returns nvCOMP's words for a status."""
        assert self.codecs.nvcomp is not None
        return self.codecs.nvcomp.explain(status)
