"""Models to evaluate: containers, Hugging Face folders and GGUF files.

Each kind has its way of loading, and of counting the bits that it stores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from codecllm.converter.source.files import SourceFile, read_json
from codecllm.formats import limits
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    SourceError,
    UnsupportedEnvironmentError,
    UsageError,
    foreign_errors_as,
)
from codecllm.formats.files import as_path
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.manifest.records import AliasTensor
from codecllm.formats.shards.safetensors_header import read_header
from codecllm.formats.shards.side_tensors import side_names
from codecllm.hub import resolve
from codecllm.loader import from_pretrained
from codecllm.loader.hf.gguf_header import check_gguf
from codecllm.loader.hf.plain import load_gguf, load_plain
from codecllm.loader.hf.quiet import without_progress_bars
from codecllm.loader.places import CPU

Kind = Literal["container", "folder", "dequantized", "gguf"]

STORED_BITS_NAME = "stored_bits.json"
"""File of a plain folder whose weights were de-quantized from another format.

It is a JSON object: tensor name -> bits that the other format stores for it. With it the folder is
a `dequantized` candidate, which has these bits and not those of its own files.
"""

_INNER = re.compile(r"\.\d+\.")
"""Part of the names of tensors inside layers: the layer's number.

Vocabularies, positions and heads have none.
"""


@dataclass(frozen=True, slots=True)
class Bits:
    """Stored sizes of a model's tensors, with their headers, padding and manifest.

    A header's bytes are shared out evenly among its entries, and the manifest's among its records.
    Tokenizer, configuration and the like are not counted.

    Attributes:
        stored: bits of all tensors.
        weights: elements of all tensors; tied ones count once.
        layer_stored: bits of the matrices inside the layers, with scales and tables.
        layer_weights: elements of those.
    """

    stored: int
    weights: int
    layer_stored: int
    layer_weights: int

    @property
    def per_weight(self) -> float:
        """Bits per weight over all tensors."""
        return self.stored / max(1, self.weights)

    @property
    def per_layer_weight(self) -> float:
        """Bits per weight over the matrices inside the layers, which is where quantizers differ."""
        return self.layer_stored / max(1, self.layer_weights)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to evaluate: its name as the caller gave it, its kind, and the place of its files."""

    name: str
    kind: Kind
    path: Path

    def load(
        self, dtype: torch.dtype, workers: int | None = None, place: torch.device = CPU
    ) -> Any:
        """Loads the model on a device with its weights in `dtype`.

        Raises:
            CodecLLMError: it cannot be loaded.
        """
        options: dict[str, Any] = {} if place == CPU else {"device_map": {"": place}}
        if self.kind == "container":
            return from_pretrained(
                self.path, dtype=dtype, resident="dense", workers=workers, progress=False, **options
            )
        # transformers raises whatever its many readers happen to raise.
        foreign_errors = foreign_errors_as(
            UnsupportedEnvironmentError, "transformers cannot load it", file=self.name
        )
        with foreign_errors, without_progress_bars():
            if self.kind == "gguf":
                return load_gguf(self.path, dtype).to(place)
            return load_plain(self.path, dtype, **options)

    def bits(self) -> Bits:
        """Returns how many bits the model stores for how many weights.

        Raises:
            FormatError: a container is damaged.
            SourceError: the files cannot be read.
        """
        rows = list(_COUNTS[self.kind](self.path))
        # Vectors and embeddings are not where formats differ.
        inner = [row for row in rows if row.rank >= 2 and _INNER.search(row.name)]
        stored_bits, layer_bits = (
            round(8 * sum(row.bytes for row in part)) for part in (rows, inner)
        )
        return Bits(
            stored_bits,
            sum(row.elements for row in rows),
            layer_bits,
            sum(row.elements for row in inner),
        )


def find_candidate(name: str | Path) -> Candidate:
    """Returns the model that a name stands for.

    Args:
        name: container or Hugging Face folder, GGUF file, or Hub id.

    Raises:
        UsageError: it is none of these.
        FormatError: a GGUF file is damaged; see `check_gguf`.
        HubError: the Hub cannot be reached.
    """
    path = as_path(name, "model")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError("no such file", got=str(name))
        check_gguf(path)  # the readers of the format trust its numbers
        return Candidate(str(name), "gguf", path)
    folder = resolve(name, kind="either").folder
    if (folder / MANIFEST_NAME).exists():
        return Candidate(str(name), "container", folder)
    if not (folder / "config.json").exists():
        raise UsageError(
            "neither a container nor a model: no codecllm.json and no config.json", got=str(name)
        )
    return Candidate(
        str(name), "dequantized" if (folder / STORED_BITS_NAME).exists() else "folder", folder
    )


class _Row(NamedTuple):
    """A tensor: name, rank, elements, and stored bytes with its share of header and manifest."""

    name: str
    rank: int
    bytes: float
    elements: int


def _container_tensors(folder: Path) -> Iterator[_Row]:
    with Container(folder) as container:
        records = container.manifest.tensors
        of_manifest = (folder / MANIFEST_NAME).stat().st_size / len(records)
        sizes: dict[str, float] = {}
        for number in range(len(container.manifest.shards)):
            _, header = container.shard(number)
            of_header = len(header.raw) / max(1, len(header.tensors))
            sizes |= {name: entry.bytes + of_header for name, entry in header.tensors.items()}
        for record in records:
            if isinstance(record, AliasTensor):
                # An alias stores no bytes of its own, only its record.
                yield _Row(record.name, 0, of_manifest, 0)
                continue
            tensor_bytes = sum(sizes[name] for name in (record.name, *side_names(record)))
            yield _Row(record.name, len(record.shape), tensor_bytes + of_manifest, record.elements)


def _folder_tensors(folder: Path) -> Iterator[_Row]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SourceError("no safetensors files", file=str(folder))
    for path in files:
        with SourceFile(folder, path.name) as file:
            header = read_header(file, max_header_bytes=limits.SOURCE_HEADER_BYTES)
        # The header is as much a part of the stored size as the data.
        of_header = len(header.raw) / max(1, len(header.tensors))
        for name, entry in header.tensors.items():
            yield _Row(name, len(entry.shape), entry.bytes + of_header, entry.elements)


def _dequantized_tensors(folder: Path) -> Iterator[_Row]:
    bits = read_json(folder, STORED_BITS_NAME)
    rows = list(_folder_tensors(folder))
    if not isinstance(bits, dict) or bits.keys() != {row.name for row in rows}:
        raise SourceError(
            "names other tensors than the folder holds", file=str(folder / STORED_BITS_NAME)
        )
    for row in rows:
        if type(bits[row.name]) is not int or bits[row.name] < 0:
            got = repr(bits[row.name])
            file = str(folder / STORED_BITS_NAME)
            raise SourceError("not a number of bits", file=file, tensor=row.name, got=got)
        yield row._replace(bytes=bits[row.name] / 8)


def _gguf_tensors(path: Path) -> Iterator[_Row]:
    from gguf import GGUFReader  # `check_gguf` has found it

    with foreign_errors_as(SourceError, "gguf cannot read it", file=str(path)):
        reader = GGUFReader(path)
    for tensor in reader.tensors:
        header_bytes = (
            sum(part.nbytes for part in tensor.field.parts)
            + -int(tensor.n_bytes) % reader.alignment
        )
        yield _Row(
            tensor.name,
            len(tensor.shape),
            int(tensor.n_bytes) + header_bytes,
            int(tensor.n_elements),
        )


_COUNTS = {
    "container": _container_tensors,
    "folder": _folder_tensors,
    "dequantized": _dequantized_tensors,
    "gguf": _gguf_tensors,
}
