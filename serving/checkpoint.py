"""A container as an engine's model loader sees a checkpoint: names and tensors, one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError
from codecllm.formats.manifest.records import AliasTensor, CodedTensor, Int8Tensor, RawTensor
from codecllm.formats.shards.side_tensors import COL_SCALE, SCALE
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.engine import Request
from codecllm.loader.reader import CPU
from codecllm.loader.resident.residency import is_by_rows
from codecllm.loader.stream import stream_requests
from codecllm.loader.torch_tensors import file_order, torch_dtype


def holds_codes(record: RawTensor | CodedTensor) -> bool:
    """Whether a tensor is a matrix of codes, one scale a row, that products can use."""
    return isinstance(record, Int8Tensor) and is_by_rows(record)


class Checkpoint:
    """The tensors of a container under the names of the source's checkpoint.

    They come in the order of the files, each one checked and decoded; a name that shares the bytes
    of another one (an alias) follows it, as a tensor object of its own.
    """

    def __init__(
        self,
        container: Container,
        *,
        dtype: torch.dtype | None = None,
        workers: int | None = None,
        device: torch.device = CPU,
        skips: Callable[[str], bool] = lambda name: False,
        as_codes: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Reads nothing yet.

        Args:
            container: an opened container, which stays open.
            dtype: dtype to which `int8` tensors are rounded once; None takes the source's, which
                all other tensors keep.
            workers: decoding threads; None takes one per core.
            device: where tensors are decoded.
            skips: whether the caller has no use for a name; such tensors are not read.
            as_codes: whether a name is handed over as codes (`holds_codes`): int8, or int16 where
                they are wide, then its scales, float32 [rows] and, if it has them, [columns], under
                the names of the side tensors (SPEC.md 5).
        """
        self._container = container
        self._dtype = dtype
        self._workers = workers
        self._device = device
        self._as_codes = as_codes
        self._skipped = {name for name in container.records if skips(name)}
        self._left = set(container.records) - self._skipped

    def tensors(self) -> Generator[tuple[str, torch.Tensor]]:
        """Yields names and tensors.

        Raises:
            FormatError: a tensor is damaged; it is not yielded.
        """
        names = self._names()
        requests = [self._request(name, part) for name, part in names]
        stream = stream_requests(
            self._container, requests, workers=self._workers, device=self._device
        )
        with closing(stream) as tensors:
            for request, tensor in zip(requests, tensors, strict=True):
                for name in names[request.name, request.part]:
                    self._left.discard(name)
                    # Engines hang attributes on a tensor: no two names may share the object.
                    yield name, tensor.detach()
                    if request.part == "codes":
                        yield from self._scales(name, request.name)
                del tensor

    def check_complete(self) -> None:
        """Raises an error unless every tensor was taken.

        Raises:
            ModelMismatchError: the model left tensors in the container.
        """
        if self._left:
            raise ModelMismatchError(
                "the model's loader stopped before this tensor",
                tensor=min(self._left),
                got=f"{len(self._left)} tensors that were not taken",
            )

    def _names(self) -> dict[tuple[str, str], list[str]]:
        """Returns the names under which a stored tensor, or its codes, are handed over."""
        aliases: defaultdict[str, list[str]] = defaultdict(list)
        for name, record in self._container.records.items():
            if isinstance(record, AliasTensor):
                aliases[record.alias_of].append(name)
        names: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for stored in file_order(self._container):
            for name in (stored, *aliases[stored]):
                if name not in self._skipped:
                    names[stored, "codes" if self._as_codes(name) else "weight"].append(name)
        return names

    def _request(self, name: str, part: str) -> Request:
        if part == "codes":
            return Request(name, "codes")
        record = self._container.records[name]
        dtype = torch_dtype(record.dtype, name)
        if isinstance(record, Int8Tensor) and self._dtype is not None:
            dtype = self._dtype
        return Request(name, "weight", dtype)

    def _scales(self, name: str, stored: str) -> Iterator[tuple[str, torch.Tensor]]:
        source = self._container.tensor(stored)
        assert isinstance(source, StoredTensor) and source.scales is not None
        # Copies: the model must not refer to memory of the container.
        yield SCALE.name_for(name), torch.from_numpy(source.scales.copy()).to(self._device)
        if source.columns is not None:
            columns = torch.from_numpy(source.columns.scales.copy())
            yield COL_SCALE.name_for(name), columns.to(self._device)
