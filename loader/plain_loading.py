"""What happens when transformers reads a container by itself: it brings stored tensors, and gets decoded ones back.

transformers opens the shards, collects the payload and side tensors of each parameter and hands them to `decode`. Which tensor
they are is told by the checksum of their chunk table, so nothing depends on names that transformers may have changed; the
bytes are then read, checked and decoded from the container's own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codecllm.formats.checksums import xxh3_hex
from codecllm.formats.container import Container, PlainTensor
from codecllm.formats.errors import ModelMismatchError, NotAContainerError, SchemaError
from codecllm.formats.manifest import MANIFEST_NAME, AliasTensor, RawTensor
from codecllm.hub import resolve
from codecllm.loader.pool import DecodePool
from codecllm.loader.state_dict import TensorReader
from codecllm.loader.torch_tensors import is_model_float

CHUNKS_SUFFIX = "_chunks"
COMPANIONS = ("_scale", "_col_scale", "_col_order", "_shape", CHUNKS_SUFFIX, "_tables")


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
        self._pool = DecodePool(self._container.decoding_threads(None))
        self._reader = TensorReader(self._container, self._pool)
        self._names: dict[str, str] = {}
        try:
            self._check_plain()
        except BaseException:
            self.close()
            raise
        self.parameter_names = sorted({name.rpartition(".")[2] for name in self._names.values()})

    def close(self) -> None:
        """Ends the threads and closes the files."""
        self._reader.close()
        self._pool.close()
        self._container.close()

    def expect(self, dtype: torch.dtype) -> None:
        """Starts to decode every coded tensor, floats as `dtype`, before transformers comes to it."""
        self._reader.expect((name, "weight", self._wanted(name, dtype)) for name in self._names.values())

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
            if any(pattern.endswith(suffix) and pattern.removesuffix(suffix) in collected for suffix in COMPANIONS):
                continue
            tables = iter(_as_list(collected.get(pattern + CHUNKS_SUFFIX, [])))
            done = [self._decode_one(tensor, tables, dtype) for tensor in _as_list(value)]
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
                raise ModelMismatchError("the model has no parameter for this alias", tensor=record.name)
            if name not in tied:
                parameter = parameters[name]
                value = self._reader.read(record.alias_of, "weight", parameter.dtype)
                parameter.data = value.to(parameter.device, copy=True)

    def _decode_one(self, stored: torch.Tensor, tables: Any, dtype: torch.dtype) -> torch.Tensor:
        if stored.dtype != torch.uint8 or stored.ndim != 1:
            return stored
        table = next(tables, None)
        if table is None:
            return stored
        name = self._names.get(xxh3_hex(table.cpu().numpy()))
        if name is None:
            raise SchemaError("chunk table is not one of this container's", file=str(self._container.folder))
        return self._reader.read(name, "weight", self._wanted(name, dtype)).to(stored.device)

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
                self._names[record.xxh3.chunks] = record.name


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
