"""The pipeline on a real device: the CPU's bits, bounded memory, errors that name the chunk."""

from __future__ import annotations

from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, DecodeError
from codecllm.loader.device.codecs import NOTHING
from codecllm.loader.device.engine import DeviceEngine
from codecllm.loader.device.streams import DeviceStreams
from codecllm.loader.engine import Request
from codecllm.loader.stream import stream_tensors
from codecllm.loader.torch_tensors import file_order, torch_dtype
from tests import tampering
from tests.malformed.builders import fix_chunks, make_container, rewrite_shard
from tests.sources import write_source

CASES = [("int8", "zstd"), ("lossless", "zstd"), ("int8", "rans"), ("lossless", "rans")]


@contextmanager
def _engine(folder, gpu, codecs):
    with (
        Container(folder) as container,
        closing(DeviceEngine(container, 8, DeviceStreams(gpu), codecs)) as engine,
    ):
        yield container, engine


def _take(engine, name, part="weight", dtype=None):
    return engine.take(Request(name, part, dtype)).get()


def _same(ours, expected):
    return ours.shape == expected.shape and torch.equal(
        ours.cpu().contiguous().view(-1).view(torch.uint8),
        expected.contiguous().view(-1).view(torch.uint8),
    )


@pytest.mark.parametrize("where", ["device", "cpu"])
@pytest.mark.parametrize(("scheme", "codec"), CASES)
def test_every_tensor_has_the_bits_of_the_cpu_path(large, gpu, codecs, scheme, codec, where):
    folder = large(scheme, codec)
    with Container(folder) as container:
        expected = {record.name: tensor for record, tensor in stream_tensors(container)}
    with _engine(folder, gpu, codecs if where == "device" else NOTHING) as (container, engine):
        names = list(file_order(container))
        wanted = {
            name: Request(name, dtype=torch_dtype(container.records[name].dtype)) for name in names
        }
        engine.prefetch(wanted.values())
        assert [
            name for name in names if not _same(engine.take(wanted[name]).get(), expected[name])
        ] == []


@pytest.mark.parametrize(("scheme", "codec"), CASES)
def test_twenty_loads_in_a_row_give_the_same_bits(large, gpu, codecs, scheme, codec):
    """A missing wait fails only now and then: the caller's stream stays busy with that memory."""
    folder = large(scheme, codec)
    with Container(folder) as container:
        expected = {
            r.name: t.to(gpu) for r, t in stream_tensors(container) if r.name.startswith("layers")
        }
    for _ in range(20):
        with _engine(folder, gpu, codecs) as (_, engine):
            engine.prefetch([Request(name, dtype=torch.bfloat16) for name in expected])
            for name, tensor in expected.items():
                garbage = torch.full_like(tensor, float("nan"))
                torch.matmul(garbage, garbage)
                del garbage
                assert torch.equal(
                    _take(engine, name, "weight", torch.bfloat16).view(torch.int16),
                    tensor.view(torch.int16),
                )


def test_codes_of_int8(large, gpu, codecs):
    with (
        _engine(large("int8", "zstd"), gpu, codecs) as (_, on_device),
        _engine(large("int8", "zstd"), gpu, NOTHING) as (_, on_cpu),
    ):
        for name in ("layers.0.weight", "odd", "h.0.attn.c_attn.weight"):
            assert torch.equal(
                _take(on_device, name, "codes", None), _take(on_cpu, name, "codes", None)
            )


@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_device_memory_beside_the_tensors_is_bounded(large, gpu, codecs, codec):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with _engine(large("int8", codec), gpu, codecs) as (container, engine):
        names = [name for name, record in container.records.items() if record.dtype == "BF16"]
        engine.prefetch([Request(name, dtype=torch.bfloat16) for name in names])
        tensors = [_take(engine, name, "weight", torch.bfloat16) for name in names]
        beside = (
            torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in tensors)
        )
    assert beside <= (3 * 64 + 128 + (400 if codec == "zstd" else 32)) << 20, beside / 2**20


@pytest.mark.usefixtures("nvcomp")
def test_a_damaged_chunk_is_named(gpu, codecs, tmp_path):
    folder = make_container(tmp_path)
    path, byte = tampering.payload_place(folder, "l", 1)
    tampering.flip_bit(path, byte + 3)
    with (
        _engine(folder, gpu, codecs) as (_, engine),
        pytest.raises(ChecksumError, match="'l' chunk 1"),
    ):
        _take(engine, "l", "weight", torch.bfloat16)


def test_corrupt_rans_words_end_in_an_error_that_names_the_chunk(gpu, codecs, tmp_path):
    values = (np.random.default_rng(1).standard_normal((200, 300)) ** 3).astype(np.float32)
    source = write_source(tmp_path / "source", {"q": ("F32", values)}, {"model_type": "none"})
    folder = convert(source, tmp_path / "out", codec="rans", include=("*",)).out

    def edit(tensors):
        tensors["q"][2][1000] ^= 1
        fix_chunks(tensors, "q")

    rewrite_shard(folder, edit)
    message = r"'q' chunk 0 at byte .*rans chunk"
    for where in (NOTHING, codecs):  # the CPU refuses it too
        with _engine(folder, gpu, where) as (_, engine), pytest.raises(DecodeError, match=message):
            _take(engine, "q", "weight", torch.bfloat16)
    assert torch.ones(8, device=gpu).sum().item() == 8  # the device still answers
