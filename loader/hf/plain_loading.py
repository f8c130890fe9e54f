"""What happens when transformers reads a container by itself: it brings stored tensors, and gets decoded ones back.

transformers opens the shards, collects the payload and side tensors of each parameter and hands them to `decode`. Which tensor
they are is told by the checksum of their chunk table, so nothing depends on names that transformers may have changed; the
bytes are then read, checked and decoded from the container's own files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codecllm.formats.checksums import xxh3_hex
from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError, NotAContainerError, SchemaError
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.manifest.records import AliasTensor, CodedTensor, RawTensor
from codecllm.formats.shards.side_tensors import CHUNKS, SIDE_TENSORS, SUFFIXES
from codecllm.formats.stored_tensor import PlainTensor
from codecllm.hub import resolve
from codecllm.loader.engine import Request
from codecllm.loader.host.threads import decoding_threads
from codecllm.loader.reader import TensorReader
from codecllm.loader.torch_tensors import is_model_float

_SIDES = [side for side in SIDE_TENSORS if side.decides_meaning]
"""Side tensors that together tell apart tensors whose payloads may be equal."""


class PlainLoad:
    """One load that transformers runs itself.

    Attributes:
        parameter_names: last parts of the names of coded tensors, `weight` for most.
    """

    def __init__(self, checkpoint_files: list[str]) -> None:
        """Opens the container to which the files belong, fetching the manifest where only the weights were.

        Every shard's header and every plainly stored tensor is checked at once; coded ones are when they are decoded.

        Raises:
            NotAContainerError: there is no manifest beside the files.
            FormatError: the container is damaged.
        """
        self._container = Container(_container_folder(checkpoint_files))
        self._reader = TensorReader(self._container, decoding_threads(None))
        self._records: dict[str, list[CodedTensor]] = {}
        try:
            self._check_plain()
        except BaseException:
            self.close()
            raise
        names = [record.name for records in self._records.values() for record in records]
        self.parameter_names = sorted({name.rpartition(".")[2] for name in names})

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self._reader.close()
        self._container.close()

    def expect(self, dtype: torch.dtype) -> None:
        """Starts to decode every coded tensor, floats as `dtype`, before transformers comes to it."""
        names = [record.name for records in self._records.values() for record in records]
        self._reader.prefetch(Request(name, dtype=self._wanted(name, dtype)) for name in names)

    def decode(self, collected: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Turns collected stored tensors into decoded ones.

        Args:
            collected: source pattern -> tensor or list of tensors; a pattern `p` of payloads comes with `p_chunks` and so on.
            dtype: dtype of the parameter.

        Returns:
            The patterns without their companions, each with decoded tensors in the same order; plain ones as they are.

        Raises:
            FormatError: a tensor is damaged, or its chunk table is not one of this container.
        """
        decoded: dict[str, Any] = {}
        for pattern, value in collected.items():
            if any(
                pattern.endswith(suffix) and pattern.removesuffix(suffix) in collected
                for suffix in SUFFIXES
            ):
                continue
            sides = {
                side.key: deque(_as_list(collected.get(side.name_for(pattern), [])))
                for side in _SIDES
            }
            done = [self._decode_one(tensor, sides, dtype) for tensor in _as_list(value)]
            decoded[pattern] = done if isinstance(value, list) else done[0]
        return decoded

    def fill_aliases(self, model: nn.Module, tied: Mapping[str, str]) -> None:
        """Gives parameters that the container stores as aliases, and the model does not tie, their values.

        Raises:
            ModelMismatchError: the model has no parameter of an alias's name.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        prefix = str(getattr(model, "base_model_prefix", ""))
        for record in self._container.manifest.tensors:
            if not isinstance(record, AliasTensor):
                continue
            names = (record.name, f"{prefix}.{record.name}", record.name.removeprefix(f"{prefix}."))
            name = next((name for name in names if name in parameters), None)
            if name is None:
                raise ModelMismatchError(
                    "the model has no parameter for this alias", tensor=record.name
                )
            if name not in tied:
                parameter = parameters[name]
                value = self._reader.read(record.alias_of, "weight", parameter.dtype)
                parameter.data = value.to(parameter.device, copy=True)

    def _decode_one(
        self, stored: torch.Tensor, sides: dict[str, deque[torch.Tensor]], dtype: torch.dtype
    ) -> torch.Tensor:
        if stored.dtype != torch.uint8 or stored.ndim != 1 or not sides[CHUNKS.key]:
            return stored.to(dtype) if stored.is_floating_point() else stored
        name = self._identify(sides)
        return self._reader.read(name, "weight", self._wanted(name, dtype)).to(stored.device)

    def _identify(self, sides: dict[str, deque[torch.Tensor]]) -> str:
        """Takes the side tensors of the next coded tensor from the queues; returns its name.

        Tensors with equal chunks (a matrix and a multiple of it, as `int8`) differ in what stands beside them.
        """
        found = self._records.get(xxh3_hex(sides[CHUNKS.key][0].cpu().numpy()), [])
        if len({_meaning(record) for record in found}) > 1:
            heads = {
                side: xxh3_hex(queue[0].cpu().numpy()) for side, queue in sides.items() if queue
            }
            found = [
                record
                for record in found
                if all(heads.get(side) == value for side, value in _meaning(record))
            ]
        if len({_meaning(record) for record in found}) != 1:
            raise SchemaError(
                "side data are not those of one tensor of this container",
                file=str(self._container.folder),
            )
        for side, _ in _meaning(found[0]):
            sides[side].popleft()
        return found[0].name

    def _wanted(self, name: str, dtype: torch.dtype) -> torch.dtype | None:
        return dtype if is_model_float(self._container.records[name].dtype) else None

    def _check_plain(self) -> None:
        for number in range(len(self._container.manifest.shards)):
            self._container.shard(number)
        for record in self._container.manifest.tensors:
            if isinstance(record, RawTensor):
                tensor = self._container.tensor(record.name)
                assert isinstance(tensor, PlainTensor)
                tensor.read()
            elif not isinstance(record, AliasTensor):
                self._records.setdefault(record.xxh3.chunks, []).append(record)


def _meaning(record: CodedTensor) -> tuple[tuple[str, str], ...]:
    """Returns the side tensors that a record has, of those that say what its payload means, and their checksums."""
    return tuple(
        (side.key, value) for side in _SIDES if (value := side.checksum(record)) is not None
    )


def _as_list(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _container_folder(checkpoint_files: list[str]) -> Path:
    if not checkpoint_files:
        raise NotAContainerError("transformers found no weight files")
    folder = Path(checkpoint_files[0]).parent
    if not (folder / MANIFEST_NAME).exists():
        files = resolve(folder)
        if files.repo is not None:
            cache = folder.resolve().parents[2]
            return resolve(files.repo, revision=files.commit, cache_dir=cache, kind="model").folder
    return folder
