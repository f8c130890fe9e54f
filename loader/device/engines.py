"""The device engines of one load, one per device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from codecllm.formats.container import Container
from codecllm.loader.device.codecs import Decoder, choose_codecs
from codecllm.loader.device.engine import DeviceEngine
from codecllm.loader.device.placement import concrete
from codecllm.loader.device.streams import ACCELERATORS, DeviceStreams, Streams


class DeviceEngines:
    """Makes the engine of a device when a tensor is first read there."""

    def __init__(
        self,
        container: Container,
        threads: int,
        decoder: Decoder = "auto",
        make_streams: Callable[[torch.device], Streams] = DeviceStreams,
        types: tuple[str, ...] = ACCELERATORS,
    ) -> None:
        """Makes none yet.

        Args:
            container: where the tensors are stored.
            threads: threads that decode on the CPU chunks that a device cannot decode.
            decoder: see `codecs.Decoder`.
            make_streams: makes the streams of a device.
            types: types of devices that get an engine. Tests give the CPU one, with its streams.
        """
        self._container = container
        self._threads = threads
        self._decoder = decoder
        self._make_streams = make_streams
        self._types = types
        self._engines: dict[torch.device, DeviceEngine] = {}

    def serves(self, device: torch.device) -> bool:
        """Whether tensors for a device come from an engine of its own."""
        return device.type in self._types

    def engine(self, device: torch.device) -> DeviceEngine:
        """Returns the engine of a device.

        Raises:
            UnsupportedEnvironmentError: the decoder that was named does not work here.
            UsageError: it has nothing to decode in this container.
        """
        # "cuda" and "cuda:0" are one device and must share one engine.
        device = concrete(device)
        if device not in self._engines:
            codecs = choose_codecs(self._decoder, device, self._container)
            streams = self._make_streams(device)
            new = DeviceEngine(self._container, self._threads, streams, codecs)
            if self._engines.setdefault(device, new) is not new:  # another thread was faster
                new.close()
        return self._engines[device]

    def close(self) -> None:
        """Closes all engines, also where an error or Ctrl-C ends the wait for one of them."""
        with ExitStack() as stack:
            for engine in list(self._engines.values()):
                stack.callback(engine.close)

    def __enter__(self) -> DeviceEngines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
