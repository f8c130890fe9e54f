"""What can be evaluated: containers, Hugging Face folders and GGUF files; how each is loaded, and how many bits it stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from codecllm.formats.container import Container, StoredTensor
from codecllm.formats.errors import SourceError, UnsupportedEnvironmentError, UsageError
from codecllm.formats.manifest import MANIFEST_NAME, AliasTensor
from codecllm.hub import resolve
from codecllm.loader import from_pretrained
from codecllm.loader import transformers_adapter as adapter

Kind = Literal["container", "folder", "gguf"]

_OUTER = ("embed", "lm_head", "wte", "wpe", "output", "classifier", "pooler")
"""Parts of names of matrices that stand outside of the layers: vocabularies, positions, heads."""


@dataclass(frozen=True, slots=True)
class Bits:
    """What a model's tensors take where they are stored; headers and manifests are not counted.

    Attributes:
        stored: bits of all tensors.
        weights: elements of all tensors; what is tied counts once.
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
    """A model to evaluate: its name as it was given, what it is, and where its files are."""

    name: str
    kind: Kind
    path: Path

    def load(self, dtype: torch.dtype, workers: int | None = None) -> Any:
        """Loads the model on the CPU with its weights in `dtype`.

        Raises:
            CodecLLMError: it cannot be loaded.
        """
        if self.kind == "container":
            return from_pretrained(self.path, dtype=dtype, workers=workers, progress=False)
        try:
            with adapter.without_progress_bars():
                if self.kind == "gguf":
                    return adapter.load_gguf(self.path, dtype)
                return adapter.load_plain(self.path, dtype)
        except Exception as exc:  # transformers raises whatever its many readers happen to raise
            raise UnsupportedEnvironmentError(
                f"transformers cannot load it ({type(exc).__name__}: {exc})", file=self.name
            ) from exc

    def bits(self) -> Bits:
        """Returns how many bits the model stores for how many weights.

        Raises:
            FormatError: a container is damaged.
            SourceError: the files cannot be read.
        """
        count = {"container": _container_tensors, "folder": _folder_tensors, "gguf": _gguf_tensors}[self.kind]
        rows = list(count(self.path))
        inner = [(bits, elements) for name, rank, bits, elements in rows if rank >= 2 and _is_inner(name)]
        return Bits(
            sum(bits for _, _, bits, _ in rows),
            sum(elements for _, _, _, elements in rows),
            sum(bits for bits, _ in inner),
            sum(elements for _, elements in inner),
        )


def find_candidate(name: str | Path) -> Candidate:
    """Returns what a name stands for.

    Args:
        name: container or Hugging Face folder, GGUF file, or Hub id.

    Raises:
        UsageError: it is neither.
        HubError: the Hub cannot be reached.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError("no such file", got=str(name))
        return Candidate(str(name), "gguf", path)
    folder = resolve(name, kind="source").folder
    if (folder / MANIFEST_NAME).exists():
        return Candidate(str(name), "container", folder)
    if not (folder / "config.json").exists():
        raise UsageError("neither a container nor a model: no codecllm.json and no config.json", got=str(name))
    return Candidate(str(name), "folder", folder)


def _is_inner(name: str) -> bool:
    if name.startswith("blk."):  # GGUF's name of a layer: blk.0.attn_output.weight is inside
        return True
    return not any(part in name for part in _OUTER)


_Row = tuple[str, int, int, int]
"""Name, rank, stored bits, elements."""


def _container_tensors(folder: Path) -> Iterator[_Row]:
    with Container(folder) as container:
        sizes: dict[str, int] = {}
        for number in range(len(container.manifest.shards)):
            _, header = container.shard(number)
            sizes |= {name: entry.end - entry.start for name, entry in header.tensors.items()}
        for record in container.manifest.tensors:
            if isinstance(record, AliasTensor):
                continue
            stored = sizes.pop(record.name)
            if isinstance(container.tensor(record.name), StoredTensor):
                sides = [name for name in sizes if name.startswith(f"{record.name}_") and name not in container.records]
                stored += sum(sizes[name] for name in sides)
            yield record.name, len(record.shape), 8 * stored, record.elements


def _folder_tensors(folder: Path) -> Iterator[_Row]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SourceError("no safetensors files", file=str(folder))
    for path in files:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, len(entry["shape"]), 8 * (end - begin), prod(entry["shape"])


def _gguf_tensors(path: Path) -> Iterator[_Row]:
    try:
        from gguf import GGUFReader
    except ImportError as exc:
        raise UnsupportedEnvironmentError("GGUF files need the package gguf: pip install 'codecllm[gguf]'") from exc
    for tensor in GGUFReader(path).tensors:
        yield tensor.name, len(tensor.shape), 8 * int(tensor.n_bytes), int(tensor.n_elements)
