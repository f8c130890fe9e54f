"""The header of a GGUF file, checked before the package gguf and transformers read it.

They take counts, lengths and offsets as they stand there, and transformers builds the model that
the metadata describe, however large.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from codecllm.formats.errors import (
    CodecLLMError,
    LayoutError,
    LimitError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
    UnsupportedEnvironmentError,
)

HEADER_BYTES = 256 << 20
"""Longest header; the vocabularies in it have up to some MiB."""

MOST_FIELDS = 1 << 16
MOST_TENSORS = 1 << 18
MOST_ITEMS = 1 << 22
"""Texts of all arrays together: vocabularies have some 300,000 tokens, and as many merges."""

MOST_EXPERTS = 4096
MOST_DIMENSION = 1 << 24
"""Largest width, number of heads or of tokens in the metadata."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9
_LONGEST_NAME = 1 << 10
_MOST_DIMENSIONS = 4
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header of a GGUF file says.

    Attributes:
        fields: numbers and short texts of the metadata by key; None for longer ones and arrays.
        tensors: shape of each tensor by name, the innermost dimension first.
    """

    fields: dict[str, Any]
    tensors: dict[str, list[int]]


class _Reader:
    """A file that is read from its beginning in order, in pieces."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed by `close`
        self.name = path.name
        self.size = os.fstat(self._file.fileno()).st_size
        self.at = 0
        self._piece, self._begin = b"", 0

    def close(self) -> None:
        self._file.close()

    def take(self, count: int) -> bytes:
        """Returns the next bytes; a count comes from the file, so it is compared first."""
        self.skip(count)
        begin = self.at - count
        if begin < self._begin or self.at > self._begin + len(self._piece):
            self._file.seek(begin)
            self._piece, self._begin = self._file.read(max(count, _PIECE_BYTES)), begin
        data = self._piece[begin - self._begin : self.at - self._begin]
        if len(data) < count:
            raise TruncatedError("file ends early", file=self.name, byte=self.size)
        return data

    def skip(self, count: int) -> None:
        """Goes on behind bytes that are not looked at."""
        if count > self.size - self.at:
            raise TruncatedError(
                "file ends early", file=self.name, byte=self.at, got=self.size, expected=count
            )
        if count > HEADER_BYTES - self.at:
            raise self.fault(LimitError, "header is too long", count, f"at most {HEADER_BYTES}")
        self.at += count

    def number(self, form: str) -> Any:
        """Returns a number in one of the letters of `struct`."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, most: int, what: str) -> int:
        """Returns a number of 64 bits that is at most `most`."""
        value: int = self.number("Q")
        if value > most:
            raise self.fault(LimitError, f"too many {what}", value, f"at most {most}")
        return value

    def name_text(self) -> str:
        """Returns a key or the name of a tensor."""
        data = self.take(self.count(_LONGEST_NAME, "bytes of a name"))
        try:
            return data.decode()
        except UnicodeDecodeError as exc:
            raise self.fault(SchemaError, "a name is not UTF-8", ascii(data)[:80]) from exc

    def fault(
        self, kind: type[CodecLLMError], message: str, got: Any, expected: str | None = None
    ) -> CodecLLMError:
        """Returns an error at this place."""
        return kind(message, file=self.name, byte=self.at, got=got, expected=expected)


def check_gguf(path: Path) -> GgufHeader:
    """Reads and checks the header of a GGUF file.

    Args:
        path: a regular file.

    Raises:
        NotAContainerError: it is no GGUF file of version 2 or 3, little-endian.
        TruncatedError: it ends inside its header, or before the data of a tensor.
        LimitError: a count or a size of its metadata is beyond a limit.
        SchemaError: a name stands twice, or a type is unknown.
        LayoutError: an offset, a shape or the alignment cannot be.
        UnsupportedEnvironmentError: the package gguf is not installed.
        OSError: it cannot be read.
    """
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError as exc:
        raise UnsupportedEnvironmentError(
            "GGUF files need the package gguf: pip install 'codecllm[gguf]'"
        ) from exc
    sizes = {int(kind): blocks for kind, blocks in GGML_QUANT_SIZES.items()}
    reader = _Reader(path)
    try:
        header = _header(reader, sizes)
    finally:
        reader.close()
    _check_counts(header, reader)
    return header


def _header(reader: _Reader, sizes: dict[int, tuple[int, int]]) -> GgufHeader:
    if reader.size < 24 or reader.take(4) != b"GGUF":
        raise NotAContainerError("this is no GGUF file", file=reader.name)
    version = reader.number("I")
    if version not in (2, 3):
        raise NotAContainerError(
            "GGUF version", file=reader.name, got=version, expected="2 or 3, little-endian"
        )
    tensor_count = reader.count(MOST_TENSORS, "tensors")
    field_count = reader.count(MOST_FIELDS, "fields")
    fields: dict[str, Any] = {}
    items = 0
    for _ in range(field_count):
        key = reader.name_text()
        if key in fields:
            raise reader.fault(SchemaError, "a key stands twice", ascii(key)[:80])
        fields[key], count = _value(reader, MOST_ITEMS - items)
        items += count
    infos: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(tensor_count):
        name = reader.name_text()
        if name in infos:
            raise reader.fault(SchemaError, "a tensor stands twice", ascii(name)[:80])
        infos[name] = _tensor(reader, sizes, name)
    _check_data(reader, fields.get("general.alignment", 32), infos)
    return GgufHeader(fields, {name: info[0] for name, info in infos.items()})


def _value(reader: _Reader, most_items: int) -> tuple[Any, int]:
    """Reads the value of a field; returns it where it is small, and its number of texts."""
    kind = reader.number("I")
    if kind in _NUMBERS:
        return reader.number(_NUMBERS[kind]), 0
    if kind == _TEXT:
        length = reader.number("Q")
        if length > _LONGEST_NAME:
            reader.skip(length)
            return None, 1
        return reader.take(length).decode("utf-8", "replace"), 1
    if kind != _ARRAY:
        raise reader.fault(SchemaError, "unknown type of a field", kind)
    inner, count = reader.number("I"), reader.number("Q")
    if inner in _NUMBERS:
        # One object for each is made of them, as of texts.
        if count > most_items:
            raise reader.fault(LimitError, "too many items", count, f"at most {most_items}")
        reader.skip(count * struct.calcsize("<" + _NUMBERS[inner]))
        return None, count
    if inner != _TEXT:
        raise reader.fault(SchemaError, "unknown type of an array's items", inner)
    if count > most_items:
        raise reader.fault(LimitError, "too many items", count, f"at most {most_items}")
    for _ in range(count):
        reader.skip(reader.number("Q"))
    return None, count


def _tensor(
    reader: _Reader, sizes: dict[int, tuple[int, int]], name: str
) -> tuple[list[int], int, int]:
    """Reads the record of a tensor; returns its shape, the offset of its data and their size."""
    dimensions = reader.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise reader.fault(LayoutError, "dimensions of a tensor", dimensions, "1 to 4").located(
            tensor=name
        )
    shape = [reader.number("Q") for _ in range(dimensions)]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in sizes:
        raise reader.fault(SchemaError, "unknown type of a tensor", kind).located(tensor=name)
    block, block_bytes = sizes[kind]
    if min(shape) < 1 or shape[0] % block:
        raise reader.fault(
            LayoutError, "shape of a tensor", shape, f"rows of whole blocks of {block}"
        ).located(tensor=name)
    return shape, offset, prod(shape) // block * block_bytes


def _check_data(
    reader: _Reader, alignment: Any, infos: dict[str, tuple[list[int], int, int]]
) -> None:
    """Checks that the data of all tensors lie in the file, each at a multiple of the alignment."""
    is_power = type(alignment) is int and 0 < alignment <= 1 << 20
    if not is_power or alignment & (alignment - 1):
        raise reader.fault(LayoutError, "alignment", alignment, "a power of two")
    begin = -(-reader.at // alignment) * alignment
    for name, (_, offset, count) in infos.items():
        if offset % alignment:
            raise reader.fault(LayoutError, "offset is not aligned", offset).located(tensor=name)
        if begin + offset + count > reader.size:
            raise TruncatedError(
                "file ends before the data",
                file=reader.name,
                tensor=name,
                got=reader.size,
                expected=begin + offset + count,
            )


def _check_counts(header: GgufHeader, reader: _Reader) -> None:
    """Compares the numbers from which a model is built with the tensors that there are."""
    for key, value in header.fields.items():
        name = key.rpartition(".")[2]
        if type(value) is not int or key.startswith(("general.", "tokenizer.")):
            continue
        most = MOST_DIMENSION
        if "block_count" in name or "layer" in name:
            most = len(header.tensors)
        elif "expert" in name and name.endswith("count"):
            most = MOST_EXPERTS
        if not 0 <= value <= most:
            raise LimitError(
                f"{key} is beyond what the file can fill",
                file=reader.name,
                got=value,
                expected=f"0 to {most}",
            )
