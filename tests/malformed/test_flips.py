"""Every bit flipped, every length cut: an error or the same bits, never other bits.

The loader's bytes are tried bit by bit through the tensors alone, without the files' sha256, so
that the checksums of header, side tensors, chunks and padding have to find it.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from codecllm.converter import ParamsChoice, convert
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, CodecLLMError, LayoutError, TruncatedError
from codecllm.formats.manifest.manifest import INDEX_NAME, MANIFEST_NAME
from codecllm.formats.manifest.reading import parse_manifest
from tests import tampering
from tests.malformed.builders import SHARD, read_everything, read_tensors
from tests.sources import bf16, write_source
from tests.stepped import provider


def _small(kind):
    rng = np.random.default_rng(2)
    if kind == "plain":
        return (
            {
                "n": ("F32", rng.standard_normal((3, 7)).astype(np.float32)),
                "i": ("I64", np.arange(9)),
            },
            "lossless",
            (),
        )
    if kind == "lossless":
        coarse = (
            bf16(rng.standard_normal((32, 64))) & 0xFFF0
        )  # both planes are coded, and the shard stays small
        return {"l": ("BF16", coarse)}, "lossless", ()
    rows = 24 if kind == "rans" else 8
    if kind == "columns":
        return {"q": ("F32", rng.standard_normal((16, 32)).astype(np.float32))}, "int8", ("*",)
    return {"q": ("F32", (rng.standard_normal((rows, 96)) ** 3).astype(np.float32))}, "int8", ("*",)


@pytest.fixture(scope="module", params=["plain", "lossless", "int8", "rans", "columns"])
def tiny(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("flips")
    tensors, scheme, include = _small(request.param)
    codec = "rans" if request.param == "rans" else "zstd"
    source = write_source(base / "source", tensors, {"model_type": "none"})
    steps = provider(0.015) if request.param == "columns" else None
    convert(
        source, base / "c", scheme=scheme, codec=codec, include=include, choice=ParamsChoice(steps)
    )
    manifest = parse_manifest((base / "c" / MANIFEST_NAME).read_bytes())
    assert {record.scheme for record in manifest.tensors} == {
        "raw" if request.param == "plain" else scheme
    }
    features = {"rans": ["rans"], "columns": ["steps", "col_scale", "wide"]}
    assert manifest.required_features == features.get(request.param, [])
    return base / "c"


@pytest.mark.many_inputs
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


@pytest.mark.many_inputs
def test_every_bit_of_a_manifest(tiny):
    data = (tiny / MANIFEST_NAME).read_bytes()
    for byte, value in enumerate(data):
        for bit in range(8):
            with pytest.raises(CodecLLMError):
                parse_manifest(data[:byte] + bytes([value ^ (1 << bit)]) + data[byte + 1 :])


@pytest.mark.many_inputs
def test_every_length_of_a_manifest(tiny):
    data = (tiny / MANIFEST_NAME).read_bytes()
    for length in range(len(data)):
        with pytest.raises(CodecLLMError):
            parse_manifest(data[:length])


@pytest.mark.many_inputs
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


@pytest.mark.many_inputs
def test_every_bit_of_every_side_file(tiny, tmp_path):
    """Each is found by the file's sha256 alone, however the file is read."""
    folder = tampering.copy_of(tiny, tmp_path / "c")
    with Container(folder) as container:
        assert [record.name for record in container.manifest.files] == ["config.json", INDEX_NAME]
        for record in container.manifest.files:
            for position in range(8 * record.bytes):
                tampering.flip_bit(folder / record.name, position // 8, position % 8)
                for check in (container.check_file, container.read_side_file):
                    with pytest.raises(ChecksumError, match="sha256"):
                        check(record)
                tampering.flip_bit(folder / record.name, position // 8, position % 8)
            container.check_file(record)


@pytest.mark.many_inputs
def test_every_length_of_every_side_file(tiny, tmp_path):
    folder = tampering.copy_of(tiny, tmp_path / "c")
    with Container(folder) as container:
        for record in container.manifest.files:
            data = (folder / record.name).read_bytes()
            for length in range(len(data)):
                (folder / record.name).write_bytes(data[:length])
                with pytest.raises(TruncatedError, match="too short"):
                    container.check_file(record)
            (folder / record.name).write_bytes(data + b" ")
            with pytest.raises(LayoutError, match="too long"):
                container.check_file(record)
            (folder / record.name).write_bytes(data)


@pytest.mark.many_inputs
def test_a_bit_of_any_file_of_a_larger_container(pristine, tmp_path):
    """All schemes in one container; one bit in every 29th byte, another bit each time."""
    folder = tampering.copy_of(pristine, tmp_path / "c")
    intact = read_everything(folder)
    for path in sorted(folder.rglob("*")):
        for byte in range(0, path.stat().st_size, 29):
            tampering.flip_bit(path, byte, byte % 8)
            with pytest.raises(CodecLLMError):
                read_everything(folder)
            tampering.flip_bit(path, byte, byte % 8)
    assert read_everything(folder) == intact
