"""Headers of safetensors files, read strictly and written deterministically.

Layout of a file: `u64 header_bytes (little-endian) | header (JSON, padded with spaces) | tensor
data`. The rules are those of the safetensors README, plus: a name stands once, and nothing is left
to the parser (see `strict_json`).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from codecllm.formats import limits
from codecllm.formats.checksums import check_xxh3
from codecllm.formats.dtypes import DTYPES, DType
from codecllm.formats.errors import (
    FormatError,
    LayoutError,
    LimitError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
)
from codecllm.formats.files import SafeFile, describe_foreign
from codecllm.formats.strict_json import JsonWalker

PREFIX_BYTES = 8
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_INTEGER = rb"(?:0|[1-9][0-9]{0,14})"  # below 2^53
_ENTRY = re.compile(
    rb'"(?!__metadata__")([^"\\\x00-\x1f\x7f-\xff]{1,256})":\{'
    rb'"dtype":"([A-Z0-9_]{1,16})",'
    rb'"shape":\[((?:%(int)s(?:,%(int)s){0,15})?)\],'
    rb'"data_offsets":\[(%(int)s),(%(int)s)\]\}' % {b"int": _INTEGER}
)
"""An entry as safetensors and our writer write it, if its name is short and plain ASCII.

It reads a header of a hundred thousand tensors in a third of the time.
"""


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file.

    Attributes:
        name: its name, at most 512 bytes of UTF-8.
        dtype: its element type.
        shape: its dimensions, each 0 or more.
        start: offset of its first byte in the file.
        end: offset behind its last byte in the file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """A parsed header.

    Attributes:
        tensors: entries by name, in the order of their data.
        metadata: the `__metadata__` strings.
        raw: the bytes before the data (length prefix and header), as read.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    raw: bytes


def read_header(
    file: SafeFile,
    *,
    max_header_bytes: int = limits.HEADER_BYTES,
    expected_xxh3: str | None = None,
) -> ShardHeader:
    """Reads and validates the header of an open safetensors file.

    Args:
        file: the open file.
        max_header_bytes: refuse a longer header.
        expected_xxh3: xxh3-64 of length prefix and header, compared before they are parsed.

    Raises:
        ChecksumError: length prefix and header differ from `expected_xxh3`.
        NotAContainerError: the file looks like something else, or is too short to be a safetensors
            file.
        TruncatedError: the file ends inside the header or the data.
        LimitError: a size passes its limit.
        SchemaError: the header is not the JSON that the format asks for.
        LayoutError: offsets overlap, leave holes, disagree with shapes, or data follows the last
            tensor.
    """
    if file.size < PREFIX_BYTES:
        raise NotAContainerError(
            "too short for a safetensors file", file=file.name, got=f"{file.size} bytes"
        )
    head = file.read(0, min(64, file.size))
    header_bytes = int.from_bytes(head[:PREFIX_BYTES], "little")
    looks_like = describe_foreign(head)
    # Only with an absurd length: a valid one may begin with the same bytes.
    if looks_like is not None and header_bytes > max_header_bytes:
        raise NotAContainerError(f"this is {looks_like}, not a safetensors file", file=file.name)
    if header_bytes > max_header_bytes:
        raise LimitError(
            "header is too long",
            file=file.name,
            got=header_bytes,
            expected=f"at most {max_header_bytes}",
        )
    if PREFIX_BYTES + header_bytes > file.size:
        raise TruncatedError("file ends inside its header", file=file.name, got=file.size)
    raw = file.read(0, PREFIX_BYTES + header_bytes)
    if expected_xxh3 is not None:
        check_xxh3(raw, expected_xxh3, file.name, None, 0)
    return parse_header(
        raw, file_bytes=file.size, file=file.name, max_header_bytes=max_header_bytes
    )


def parse_header(
    raw: bytes, *, file_bytes: int, file: str, max_header_bytes: int = limits.HEADER_BYTES
) -> ShardHeader:
    """Validates length prefix and header together; `file_bytes` is the size of the whole file.

    Errors as `read_header`.
    """
    if raw[PREFIX_BYTES : PREFIX_BYTES + 1] != b"{":
        raise SchemaError("header does not begin with '{'", file=file, byte=PREFIX_BYTES)
    if len(raw) - PREFIX_BYTES > max_header_bytes:
        raise LimitError("header is too long", file=file, got=len(raw) - PREFIX_BYTES)
    base, metadata, entries = len(raw), {}, []
    walker = JsonWalker(raw, file=file, begin=PREFIX_BYTES)
    for name, match in walker.members_like(_ENTRY, limits.TENSORS, "tensors"):
        if match is not None:
            entry = _plain_entry(name, match, base)
            entries.append(entry or _parse_entry(name, _fields(match), base, file))
        elif name == "__metadata__":
            metadata = _read_metadata(walker, file)
        else:
            entries.append(_parse_entry(name, walker.value(limits.RECORD_BYTES), base, file))
    walker.end()
    # JSON has its own order; that of the data shows holes and overlaps.
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_coverage(entries, base, file_bytes, file)
    return ShardHeader({entry.name: entry for entry in entries}, metadata, raw)


def _plain_entry(name: str, match: re.Match[bytes], base: int) -> TensorEntry | None:
    """Returns what `_parse_entry` makes of an entry that `_ENTRY` matches, or None for its error.

    The pattern has checked the name, and that numbers are whole and not negative.
    """
    _, dtype_text, dims, start_text, end_text = match.groups()
    kind = _plain_type(dtype_text, dims)
    start, end = int(start_text), int(end_text)
    if kind is None or end - start != kind[2]:
        return None
    return TensorEntry(name, kind[0], kind[1], base + start, base + end)


@lru_cache(maxsize=1 << 10)  # a model has many tensors of few shapes
def _plain_type(dtype_text: bytes, dims: bytes) -> tuple[DType, tuple[int, ...], int] | None:
    """Returns dtype, shape and bytes of an entry; None where `_parse_entry` has an error for it."""
    dtype = DTYPES.get(dtype_text.decode("ascii"))
    try:
        shape = check_shape([int(dim) for dim in dims.split(b",") if dim], "", "")
    except FormatError:
        return None
    size_bits = math.prod(shape) * dtype.bits if dtype is not None else 1
    return (dtype, shape, size_bits // 8) if dtype is not None and not size_bits % 8 else None


def _fields(match: re.Match[bytes]) -> dict[str, Any]:
    """Returns the value of an entry that `_ENTRY` matches, as JSON has it."""
    return {
        "dtype": match[2].decode("ascii"),
        "shape": [int(dim) for dim in match[3].split(b",") if dim],
        "data_offsets": [int(match[4]), int(match[5])],
    }


def _read_metadata(walker: JsonWalker, file: str) -> dict[str, str]:
    problem = SchemaError("__metadata__ is not an object of strings", file=file)
    if not walker.stands_at(b"{"):
        raise problem
    metadata = {}
    for key in walker.members(limits.METADATA, "keys of __metadata__"):
        if not walker.stands_at(b'"'):
            raise problem
        metadata[key] = walker.value(limits.HEADER_BYTES)
    return metadata


def check_name(name: str, file: str) -> None:
    """Raises where a tensor name is empty, reserved, too long, or holds control characters."""
    if not name or name == "__metadata__" or _CONTROL.search(name):
        raise SchemaError(
            "tensor name is empty, reserved or holds control characters",
            file=file,
            got=ascii(name)[:80],
        )
    if len(name.encode()) > limits.NAME_BYTES:
        raise LimitError("tensor name is too long", file=file, got=ascii(name)[:80])


def check_shape(shape: Any, file: str, tensor: str) -> tuple[int, ...]:
    """Returns a list of dimensions as a tuple.

    Raises:
        SchemaError: not a list of non-negative integers.
        LimitError: too many dimensions, too large a dimension, or too many elements.
    """
    # `type`, since True is an instance of int.
    if not isinstance(shape, list | tuple) or any(type(dim) is not int or dim < 0 for dim in shape):
        raise SchemaError(
            "shape is not a list of non-negative integers",
            file=file,
            tensor=tensor,
            got=str(shape)[:80],
        )
    if len(shape) > limits.RANK or any(dim > limits.DIM for dim in shape):
        raise LimitError("shape passes the limits", file=file, tensor=tensor, got=str(shape)[:80])
    # max: a dimension of 0 must not hide absurd ones beside it.
    if math.prod(max(dim, 1) for dim in shape) > limits.ELEMENTS:
        raise LimitError("tensor is too large", file=file, tensor=tensor, got=str(shape)[:80])
    return tuple(shape)


@lru_cache(maxsize=1 << 10)  # a model has many tensors of few shapes
def has_sound_dims(shape: tuple[int, ...]) -> bool:
    """Whether `check_shape` accepts a shape of integers."""
    try:
        check_shape(shape, "", "")
    except FormatError:
        return False
    return True


def _parse_entry(name: str, fields: Any, base: int, file: str) -> TensorEntry:
    check_name(name, file)
    if not isinstance(fields, dict) or set(fields) != _ENTRY_KEYS:
        raise SchemaError("entry must have dtype, shape and data_offsets", file=file, tensor=name)
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise SchemaError("unknown dtype", file=file, tensor=name, got=str(fields["dtype"])[:40])
    shape = check_shape(fields["shape"], file, name)
    offsets = fields["data_offsets"]
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(item) is not int for item in offsets)
    ):
        raise SchemaError("data_offsets is not a pair of integers", file=file, tensor=name)
    start, end = offsets
    size_bits = math.prod(shape) * dtype.bits
    if not 0 <= start <= end or size_bits % 8 or end - start != size_bits // 8:
        raise LayoutError(
            "data_offsets disagree with dtype and shape",
            file=file,
            tensor=name,
            got=str(offsets),
            expected=f"{size_bits / 8:g} bytes",
        )
    return TensorEntry(name, dtype, shape, base + start, base + end)


def _check_coverage(entries: list[TensorEntry], base: int, file_bytes: int, file: str) -> None:
    position = base
    for entry in entries:
        if entry.start != position:
            kind = (
                "overlaps the tensor before it"
                if entry.start < position
                else "leaves a hole before it"
            )
            raise LayoutError(
                f"data {kind}", file=file, tensor=entry.name, byte=entry.start, expected=position
            )
        position = entry.end
    if position > file_bytes:
        raise TruncatedError(
            "file ends inside its data", file=file, got=file_bytes, expected=position
        )
    if position < file_bytes:
        raise LayoutError(
            "bytes follow the last tensor",
            file=file,
            byte=position,
            got=file_bytes,
            expected=position,
        )


def pack_header(
    entries: list[TensorEntry], metadata: dict[str, str], header_bytes: int | None = None
) -> bytes:
    """Builds length prefix and header.

    Args:
        entries: tensors in the order of their data; `start` and `end` count from the first data
            byte, not from the file's.
        metadata: strings for `__metadata__`.
        header_bytes: pad the JSON text with spaces to this size; None pads to a multiple of 8.

    Raises:
        LimitError: the text does not fit.
    """
    # Sorted: equal containers have equal headers.
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for entry in entries:
        document[entry.name] = {
            "dtype": entry.dtype.name,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    # A multiple of 8 aligns the data, as in files of the safetensors library.
    size = header_bytes if header_bytes is not None else -(-len(text) // 8) * 8
    if len(text) > size or size > limits.HEADER_BYTES:
        raise LimitError(
            "header does not fit",
            got=len(text),
            expected=f"at most {min(size, limits.HEADER_BYTES)}",
        )
    return size.to_bytes(PREFIX_BYTES, "little") + text.ljust(size)
