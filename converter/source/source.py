"""The source model: a folder of safetensors files, read strictly and by offset; never executed, never loaded whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecllm.formats import limits
from codecllm.formats.dtypes import DType
from codecllm.formats.errors import (
    SchemaError,
    SourceError,
    TruncatedError,
    UnsafePathError,
    UnsafeSourceError,
)
from codecllm.formats.files import SafeFile, describe_missing, is_safe_name
from codecllm.formats.manifest.manifest import INDEX_NAME, MANIFEST_NAME
from codecllm.formats.schemes.lossless import word_dtype
from codecllm.formats.shards.safetensors_header import TensorEntry, read_header
from codecllm.formats.shards.side_tensors import SUFFIXES
from codecllm.formats.strict_json import parse_json_object

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX_BYTES = 250 << 20
_FOREIGN_SUFFIXES = ("_scale_inv", "_zero_point", "_packed", "_absmax", "_quant_state")
"""Ends of the names of side tensors in the formats of other quantization libraries."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of the source and where its bytes lie.

    Attributes:
        entry: name, dtype, shape and offsets in its file.
        file: the open file.
    """

    entry: TensorEntry
    file: SafeFile

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.entry.name

    @property
    def dtype(self) -> DType:
        """Its element type."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.entry.shape

    def read_elements(
        self, first: int, last: int, buffer: NDArray[np.uint8] | None = None
    ) -> NDArray[np.unsignedinteger]:
        """Reads elements [first, last) of the row-major order as unsigned integers of the element's size (whole-byte types).

        Args:
            first: first element.
            last: element behind the last one.
            buffer: uint8, large enough: the result is a view of its head. None allocates.

        Raises:
            TruncatedError: the file became shorter since it was opened.
        """
        size = self.dtype.itemsize
        target = (
            np.empty((last - first) * size, np.uint8)
            if buffer is None
            else buffer[: (last - first) * size]
        )
        self.file.read_into(self.entry.start + first * size, memoryview(target))
        return target.view(word_dtype(self.dtype))

    def read_bytes(self, first: int, last: int) -> bytes:
        """Reads bytes [first, last) of the tensor's data."""
        return self.file.read(self.entry.start + first, last - first)


class SourceModel:
    """A local folder with one model, opened for reading.

    Attributes:
        folder: the folder.
        config: the parsed config.json, or None where there is none.
        tensors: all tensors by name, in the order of the files and of their data.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens every weight file of `folder` and checks its header.

        Raises:
            SourceError: no folder, no weights, or a model that is quantized or converted already.
            UnsafeSourceError: there are only pickles.
            FormatError: a weight file or the index is malformed, or a name leads outside the folder.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SourceError(
                describe_missing(self.folder, "a model is a folder with config.json in it"),
                file=str(folder),
            )
        if (self.folder / MANIFEST_NAME).exists():
            raise SourceError("this is a codecllm container already", file=str(folder))
        self.config = _read_config(self.folder)
        self.tensors: dict[str, SourceTensor] = {}
        self._files: list[SafeFile] = []
        try:
            self._open_files()
        except BaseException:
            self.close()
            raise

    @property
    def model_type(self) -> str:
        """`model_type` of the config, or an empty string."""
        return str((self.config or {}).get("model_type", ""))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.entry.bytes for tensor in self.tensors.values())

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.entry.elements for tensor in self.tensors.values())

    def check_unchanged(self) -> None:
        """Raises SourceError where a file was replaced or written to since it was opened."""
        for file in self._files:
            if not file.unchanged():
                raise SourceError("source changed while it was read", file=file.name)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> SourceModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_files(self) -> None:
        weight_map = _read_weight_map(self.folder)
        names = (
            sorted(set(weight_map.values()))
            if weight_map is not None
            else [_single_file(self.folder)]
        )
        for name in names:
            file = SafeFile(self.folder, name)
            self._files.append(file)
            for entry in read_header(
                file, max_header_bytes=limits.SOURCE_HEADER_BYTES
            ).tensors.values():
                if entry.name in self.tensors:
                    raise SourceError("tensor stands in two files", file=name, tensor=entry.name)
                self.tensors[entry.name] = SourceTensor(entry, file)
        if weight_map is not None:
            _check_weight_map(weight_map, self.tensors)
        _refuse_quantized(self.config, self.tensors)
        if not self.tensors:
            raise SourceError("the model holds no tensors", file=str(self.folder))


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Reads config.json leniently (real ones hold `Infinity`); no value of it is trusted for sizes or paths."""
    try:
        with SafeFile(folder, "config.json") as file:
            data = file.read(0, file.size) if file.size <= limits.MANIFEST_BYTES else b""
    except TruncatedError:
        return None
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"not JSON ({exc})", file="config.json") from exc
    if not isinstance(config, dict):
        raise SourceError("top level is not an object", file="config.json")
    return config


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    if not (folder / INDEX_NAME).exists():
        return None
    with SafeFile(folder, INDEX_NAME) as file:
        document = parse_json_object(
            file.read(0, file.size), file=INDEX_NAME, max_bytes=_INDEX_BYTES
        )
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise SchemaError("weight_map is not an object of file names", file=INDEX_NAME)
    for name in set(weight_map.values()):
        if not is_safe_name(name) or not name.endswith(".safetensors"):
            raise UnsafePathError(
                "weight_map names an unsafe file", file=INDEX_NAME, got=ascii(name)[:80]
            )
    return weight_map


def _single_file(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".safetensors"))
    if "model.safetensors" in names:
        return "model.safetensors"
    if len(names) == 1:
        return names[0]
    if names:
        raise SourceError(
            f"several safetensors files but no {INDEX_NAME}",
            file=str(folder),
            got=", ".join(names[:5]),
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(_PICKLE_SUFFIXES))
    if pickles:
        raise UnsafeSourceError(
            "weights are pickles, which run code when they are opened; convert them to safetensors in a sandbox first",
            file=pickles[0],
        )
    raise SourceError("folder holds no safetensors files", file=str(folder))


def _check_weight_map(weight_map: dict[str, str], tensors: dict[str, SourceTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise SourceError("index names a tensor that its file lacks", file=file, tensor=name)
        if tensors[name].file.name != file:
            raise SourceError(
                "tensor stands in another file than the index says",
                file=tensors[name].file.name,
                tensor=name,
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise SourceError(
                "file holds a tensor that the index lacks", file=tensor.file.name, tensor=name
            )


def _refuse_quantized(config: dict[str, Any] | None, tensors: dict[str, SourceTensor]) -> None:
    for key in ("quantization_config", "compression_config"):
        if (config or {}).get(key):
            block = (config or {})[key]
            method = block.get("quant_method", "?") if isinstance(block, dict) else "?"
            raise SourceError(
                f"the model is quantized already ({key}: {method}); convert the original",
                file="config.json",
            )
    for name, tensor in tensors.items():
        for suffix in (*SUFFIXES, *_FOREIGN_SUFFIXES):
            if name.endswith(suffix) and name.removesuffix(suffix) in tensors:
                raise SourceError(
                    "tensor is named like the side data of a quantized one; convert the original model",
                    file=tensor.file.name,
                    tensor=name,
                )
