"""Every bit flipped, every length cut: an error or the same bits, never other bits.

What a loader reads is tried bit by bit through the tensors alone, without the files' sha256, so that the checksums of
header, side tensors, chunks and padding have to find it.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.errors import CodecLLMError
from codecllm.formats.manifest import MANIFEST_NAME, parse_manifest
from tests import tampering
from tests.malformed.builders import SHARD, read_everything, read_tensors
from tests.sources import bf16, write_source


def _small(kind):
    rng = np.random.default_rng(2)
    if kind == "plain":
        return {"n": ("F32", rng.standard_normal((3, 7)).astype(np.float32)), "i": ("I64", np.arange(9))}, "lossless", ()
    if kind == "lossless":
        return {"l": ("BF16", bf16(rng.standard_normal((40, 64))))}, "lossless", ()
    return {"q": ("F32", (rng.standard_normal((8, 96)) ** 3).astype(np.float32))}, "int8", ("*",)


@pytest.fixture(scope="module", params=["plain", "lossless", "int8"])
def tiny(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("flips")
    tensors, scheme, include = _small(request.param)
    convert(write_source(base / "source", tensors), base / "c", scheme=scheme, include=include)
    schemes = {record.scheme for record in parse_manifest((base / "c" / MANIFEST_NAME).read_bytes()).tensors}
    assert schemes == {"raw" if request.param == "plain" else request.param}
    return base / "c"


def test_every_bit_of_a_shard(tiny, tmp_path):
    folder = tampering.copy_of(tiny, tmp_path / "c")
    intact, path = read_tensors(folder), folder / SHARD
    data = path.read_bytes()
    descriptor = os.open(path, os.O_WRONLY)
    unnoticed = []
    for byte, value in enumerate(data):
        for bit in range(8):
            os.pwrite(descriptor, bytes([value ^ (1 << bit)]), byte)
            try:
                assert read_tensors(folder) == intact, f"silently wrong: byte {byte}, bit {bit}"
                unnoticed.append((byte, bit))
            except CodecLLMError:
                pass
        os.pwrite(descriptor, bytes([value]), byte)
    os.close(descriptor)
    assert unnoticed == []
    assert read_tensors(folder) == intact


def test_every_bit_of_a_manifest(tiny):
    data = (tiny / MANIFEST_NAME).read_bytes()
    for byte, value in enumerate(data):
        for bit in range(8):
            with pytest.raises(CodecLLMError):
                parse_manifest(data[:byte] + bytes([value ^ (1 << bit)]) + data[byte + 1 :])


def test_every_length_of_a_manifest(tiny):
    data = (tiny / MANIFEST_NAME).read_bytes()
    for length in range(len(data)):
        with pytest.raises(CodecLLMError):
            parse_manifest(data[:length])


def test_every_length_of_a_shard(tiny, tmp_path):
    folder = tampering.copy_of(tiny, tmp_path / "c")
    data = (folder / SHARD).read_bytes()
    for length in range(len(data)):
        (folder / SHARD).write_bytes(data[:length])
        with pytest.raises(CodecLLMError) as caught:
            read_tensors(folder)
        assert caught.value.file == SHARD
    (folder / SHARD).write_bytes(data + b"\0")
    with pytest.raises(CodecLLMError, match="too long"):
        read_tensors(folder)


def test_one_bit_of_every_byte_of_every_listed_file(pristine, tmp_path):
    folder = tampering.copy_of(pristine, tmp_path / "c")
    intact = read_everything(folder)
    for path in sorted(folder.rglob("*")):
        for byte in range(0, path.stat().st_size, 3):
            tampering.flip_bit(path, byte, byte % 8)
            with pytest.raises(CodecLLMError):
                read_everything(folder)
            tampering.flip_bit(path, byte, byte % 8)
    assert read_everything(folder) == intact
