"""Functions that take any bytes: a reader gives a result of the right size, or one error of ours.

They need no fuzzer: the committed inputs are replayed as tests, and `make fuzz-python` lets a
coverage-guided fuzzer search for more. Seals and checksums are made to fit, or no input would come
past them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from codecllm.converter.source.source import SourceModel
from codecllm.formats.checksums import sha256_hex
from codecllm.formats.codecs import ZSTD, rans, rans_reference
from codecllm.formats.codecs.rans_numpy import Coded
from codecllm.formats.codecs.rans_table import parse_table
from codecllm.formats.codecs.raw import RawCodec
from codecllm.formats.errors import CodecLLMError
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.formats.shards.chunk_table import parse_chunk_table
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES, parse_header
from codecllm.formats.strict_json import parse_json_object
from tests.fuzz.changed import Change, Original, make_originals

Target = Callable[[bytes], None]
_MOST_BYTES = 1 << 16


def manifest(data: bytes) -> None:
    """A manifest without its seal, which is added."""
    text = data.rstrip()[:-1] + b",\n"
    seal = f'"manifest_sha256":"{sha256_hex(text)}"}}\n'.encode()
    with suppress(CodecLLMError):
        parse_manifest(text + seal)


def shard_header(data: bytes) -> None:
    """Two bytes: how much data follows the header; then the header's JSON."""
    body = int.from_bytes(data[:2], "little")
    raw = len(data[2:]).to_bytes(PREFIX_BYTES, "little") + data[2:]
    with suppress(CodecLLMError):
        header = parse_header(raw, file_bytes=len(raw) + body, file="f")
        assert sum(entry.bytes for entry in header.tensors.values()) == body


def chunk_table(data: bytes) -> None:
    """Four bytes: the size of the payload; then the table."""
    payload = int.from_bytes(data[:4], "little")
    with suppress(CodecLLMError):
        table = parse_chunk_table(data[4:], payload_bytes=payload, file="f", tensor="t")
        assert int(table.offsets[-1]) == payload


def codec_raw(data: bytes) -> None:
    """Two bytes: the declared size; then the chunk."""
    _decode(RawCodec(), data)


def codec_zstd(data: bytes) -> None:
    """Two bytes: the declared size; then the frame."""
    _decode(ZSTD, data)


def _decode(codec: Any, data: bytes) -> None:
    size = int.from_bytes(data[:2], "little")
    with suppress(CodecLLMError):
        assert len(codec.decode(memoryview(data)[2:], size)) == size


def codec_rans(data: bytes) -> None:
    """Two bytes: the declared size, modulo 1024; two: that of the table; the table, the chunk.

    The decoder in use (native, where it is built) agrees with the reference.
    """
    size, table_bytes = (int.from_bytes(data[at : at + 2], "little") for at in (0, 2))
    # 32 rounds of all lanes: more of them repeat the same steps, in milliseconds.
    size %= 1024
    with suppress(CodecLLMError):
        table = parse_table(data[4 : 4 + table_bytes])
        stored = data[4 + table_bytes :]
        (decoded,) = rans.decode_chunks([Coded(memoryview(stored), size, table)])
        try:
            expected = rans_reference.decode(stored, size, table)
        except CodecLLMError:
            assert isinstance(decoded, CodecLLMError), "the reference refuses this chunk"
        else:
            assert not isinstance(decoded, CodecLLMError), decoded
            assert bytes(decoded) == expected


def container(data: bytes) -> None:
    """One byte: which container; then changes: tensor, place (two bytes) and value.

    Its checksums are made to fit.
    """
    originals = _originals()
    original = originals[int.from_bytes(data[:1]) % len(originals)]
    names = list(original.tensors)
    original.read_changed(
        [
            Change(
                names[data[at] % len(names)],
                int.from_bytes(data[at + 1 : at + 3], "little"),
                data[at + 3],
            )
            for at in range(1, min(len(data), 33) - 3, 4)
        ]
    )


def source(data: bytes) -> None:
    """Two bytes: the size of config.json; config.json; the rest is model.safetensors."""
    size = int.from_bytes(data[:2], "little")
    folder = _scratch() / "source"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data[2 : 2 + size])
    (folder / "model.safetensors").write_bytes(data[2 + size :])
    with suppress(CodecLLMError), SourceModel(folder) as model:
        for tensor in model.tensors.values():
            count = min(tensor.entry.bytes, _MOST_BYTES)
            with suppress(CodecLLMError):
                assert len(tensor.read_bytes(0, count)) == count


def config(data: bytes) -> None:
    """A config.json as a load reads it before transformers does."""
    from codecllm.loader.config_size import check_config_size

    with suppress(CodecLLMError):
        document = parse_json_object(data, file="config.json", max_bytes=_MOST_BYTES)
        check_config_size(document, 10)


@cache
def _scratch() -> Path:
    # In memory where that is possible: to replace a file on a disk costs milliseconds.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="codecllm-fuzz-", dir=memory)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _originals() -> list[Original]:
    return make_originals(_scratch())


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        manifest,
        shard_header,
        chunk_table,
        codec_raw,
        codec_zstd,
        codec_rans,
        container,
        source,
        config,
    )
}
