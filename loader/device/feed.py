"""What the rest of the loader asks of a device: finished tensors, decoded ahead of the requests where these are known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.formats.manifest.records import AliasTensor
from codecllm.loader.device.codecs import Decoder, DeviceCodecs, choose_codecs
from codecllm.loader.device.pipeline import DevicePipeline
from codecllm.loader.device.plan import Part, Request
from codecllm.loader.device.streams import ACCELERATORS, DeviceStreams, Streams, is_accelerator
from codecllm.loader.host.pool import DecodePool
from codecllm.loader.host.promise import Promise
from codecllm.loader.progress import Meter
from codecllm.loader.torch_tensors import file_order

Wanted = tuple[str, Part, torch.dtype | None]
"""Name of a stored tensor, what of it, and the dtype of a weight."""


class DeviceFeed:
    """Tensors of a container on one device."""

    def __init__(
        self,
        container: Container,
        pool: DecodePool,
        streams: Streams,
        codecs: DeviceCodecs,
        meter: Meter | None,
    ):
        """Starts the pipeline."""
        self._container, self._meter = container, meter
        self._pipeline = DevicePipeline(container, pool, streams, codecs)
        self._ahead: dict[Wanted, Promise[torch.Tensor]] = {}
        self._lock = threading.Lock()
        self.streams, self.codecs = streams, codecs

    def expect(self, wanted: Iterable[Wanted]) -> None:
        """Reads tensors ahead, in this order (that of the files is quickest), and from the first `take` on decodes them all.

        Until then no memory of the device is taken for them: a model that is being built may be measuring what is free.
        """
        with self._lock:
            for key in wanted:
                if key not in self._ahead:
                    self._ahead[key] = self._pipeline.request(Request(*key))

    def take(self, name: str, part: Part, dtype: torch.dtype | None) -> torch.Tensor:
        """Returns a tensor on the device, complete and checked; the feed keeps no reference.

        Raises:
            FormatError: the tensor, or one that is decoded ahead, is damaged.
        """
        with self._lock:
            promise = self._ahead.pop((name, part, dtype), None) or self._pipeline.request(
                Request(name, part, dtype)
            )
        self._pipeline.start_decoding()
        tensor = promise.get()
        if self._meter is not None:
            record = self._container.records[name]
            assert not isinstance(record, AliasTensor)
            self._meter.add(name, record.source_bytes)
        return tensor

    def fill(self, places: dict[str, torch.Tensor]) -> None:
        """Fills memory on the device (uint8 [payload bytes] each) with the checked payloads of tensors, by name.

        Raises:
            FormatError: one is damaged.
        """
        requests = [
            Request(name, "payload", None, out=places[name])
            for name in file_order(self._container)
            if name in places
        ]
        promises = [self._pipeline.request(request) for request in requests]
        self._pipeline.start_decoding()
        for promise in promises:
            promise.get()

    def close(self) -> None:
        """Ends the pipeline and drops tensors that nobody took."""
        self._pipeline.close()
        self._ahead.clear()


class DeviceFeeds:
    """The feeds of one load, one per device, each made when a tensor is first wanted there."""

    def __init__(
        self,
        container: Container,
        pool: DecodePool,
        decoder: Decoder = "auto",
        meter: Meter | None = None,
        make_streams: Callable[[torch.device], Streams] = DeviceStreams,
        types: tuple[str, ...] = ACCELERATORS,
    ) -> None:
        """Prepares feeds that decode with `decoder`.

        Args:
            container: where tensors come from.
            pool: threads that read.
            decoder: see `codecs.Decoder`.
            meter: counts what was taken.
            make_streams: makes the streams of a device.
            types: types of devices that it serves. Tests serve the CPU, with its streams.
        """
        self._container, self._pool, self._decoder, self._meter = container, pool, decoder, meter
        self._make_streams, self._types = make_streams, types
        self._feeds: dict[torch.device, DeviceFeed] = {}
        self._lock = threading.Lock()

    def serves(self, device: torch.device) -> bool:
        """Whether tensors for a device come through a feed."""
        return device.type in self._types

    def feed(self, device: torch.device) -> DeviceFeed:
        """Returns the feed of a device."""
        device = concrete(device)
        with self._lock:
            if device not in self._feeds:
                codecs = choose_codecs(self._decoder, device, self._container)
                made = DeviceFeed(
                    self._container, self._pool, self._make_streams(device), codecs, self._meter
                )
                self._feeds[device] = made
            return self._feeds[device]

    def close(self) -> None:
        """Ends every feed, whatever ends the wait for one of them."""
        with ExitStack() as stack:
            for feed in self._feeds.values():
                stack.callback(feed.close)

    def __enter__(self) -> DeviceFeeds:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def concrete(device: torch.device) -> torch.device:
    """Returns a device with its index."""
    if is_accelerator(device) and ":" not in str(device):
        return torch.device(device.type, getattr(torch, device.type).current_device())
    return device


def has_device() -> bool:
    """Whether torch finds an accelerator here."""
    return any(getattr(torch, kind).is_available() for kind in ACCELERATORS if hasattr(torch, kind))


def sole_device(device_map: Any, needed_bytes: int, max_memory: Any = None) -> torch.device | None:
    """Returns the one accelerator onto which a device map certainly puts the whole model, or None.

    Args:
        device_map: as transformers takes it. The automatic ones count where there is one device and it has plenty of room.
        needed_bytes: what the model takes.
        max_memory: as transformers takes it: with limits of the caller an automatic map may put parts elsewhere.
    """
    if isinstance(device_map, str) and device_map in (
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
    ):
        if max_memory is not None or torch.cuda.device_count() != 1:
            return None
        free, _ = torch.cuda.mem_get_info(0)
        return (
            torch.device("cuda", 0) if free > needed_bytes + needed_bytes // 4 + (2 << 30) else None
        )
    if isinstance(device_map, dict):
        places = {str(place) for place in device_map.values()}
        device_map = next(iter(device_map.values())) if len(places) == 1 else None
    try:
        device = (
            torch.device("cuda", device_map)
            if isinstance(device_map, int)
            else torch.device(device_map)
        )
    except (RuntimeError, TypeError):  # none, or "disk"
        return None
    usable = is_accelerator(device) and getattr(torch, device.type).is_available()
    return concrete(device) if usable else None


def refuse_without_device(decoder: Decoder, device_map: Any) -> None:
    """Refuses a decoder that needs a GPU where the model is not put on one.

    Raises:
        UsageError: `decoder` is "nvcomp" or "triton" and `device_map` None or the CPU.
        UnsupportedEnvironmentError: there is no GPU.
    """
    if decoder not in ("nvcomp", "triton"):
        return
    if not has_device():
        raise UnsupportedEnvironmentError(
            f"decoder {decoder!r} does not work here: torch finds no GPU"
        )
    if device_map is None or str(device_map) == "cpu":
        got = f"device_map={device_map!r}"
        raise UsageError(
            f"decoder {decoder!r} decodes on a GPU", got=got, expected='for example "cuda"'
        )
