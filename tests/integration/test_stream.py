"""`stream_tensors` gives the bits of the reference, and no tensor from damaged bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from codecllm.converter import ParamsChoice, convert
from codecllm.converter.plan.params import QuantParams
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, NotAContainerError, UsageError
from codecllm.formats.reference import read_codes, read_tensor_bytes
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.loader import stream_tensors
from codecllm.loader.engine import Request
from codecllm.loader.host.decode import Workspace, dequantize
from codecllm.loader.stream import stream_requests
from codecllm.loader.torch_tensors import TORCH_DTYPES
from tests import tampering
from tests.sources import write_source

ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)


def _source(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    tensors = {
        "f16.every_pattern": ALL_16_BITS.view(np.float16),
        "f32": rng.standard_normal((123, 300)).astype(np.float32),
        "f32.long_row": rng.standard_normal((1, 300_001)).astype(np.float32),
        "f64": rng.standard_normal((33, 65)),
        "i64": rng.integers(-5, 900, (70, 70)),
        "i32": rng.integers(-5, 900, (70, 70), dtype=np.int32),
        "i16": rng.integers(-5, 900, (70, 70), dtype=np.int16),
        "i8": rng.integers(-5, 5, (70, 70), dtype=np.int8),
        "u8": rng.integers(0, 9, (70, 70), dtype=np.uint8),
        "bool": rng.integers(0, 2, (70, 70)).astype(bool),
        "norm": np.ones(64, np.float32),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 7), np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=["lossless", "int8"])
def every_dtype(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("stream")
    options = {"include": ("f32*",), "exclude": ("f16*", "f64")} if request.param == "int8" else {}
    convert(_source(base / "source"), base / "out", scheme=request.param, **options)
    return base / "out"


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_stream_gives_the_bits_of_the_reference(every_dtype, workers):
    with Container(every_dtype) as container:
        seen = []
        for record, tensor in stream_tensors(container, workers=workers):
            assert tensor.dtype == TORCH_DTYPES[record.dtype]
            assert list(tensor.shape) == record.shape
            assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == read_tensor_bytes(
                container, record.name
            )
            seen.append(record.name)
        assert sorted(seen) == sorted(container.records)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_stream_casts_floats_only(every_dtype, dtype):
    with Container(every_dtype) as container:
        for record, tensor in stream_tensors(container, dtype=dtype, workers=2):
            own = TORCH_DTYPES[record.dtype]
            assert tensor.dtype == (dtype if own.is_floating_point else own), record.name


@pytest.mark.parametrize("workers", [2, 8])
def test_bf16_patterns_survive(tmp_path, workers):
    """Few threads join tile by tile, many gather planes first."""
    from safetensors.torch import save_file as save_torch

    (tmp_path / "source").mkdir()
    bits = torch.from_numpy(ALL_16_BITS.view(np.int16).copy())
    save_torch({"w": bits.view(torch.bfloat16)}, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "out", scheme="lossless")
    with Container(tmp_path / "out") as container:
        (_, tensor), *rest = stream_tensors(container, workers=workers)
    assert rest == []
    assert torch.equal(tensor.view(torch.int16), bits)


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_dequantize_rounds_like_the_reference_for_every_code(target):
    """Every code against scales that give ties, subnormals, overflows and ordinary values."""
    rng = np.random.default_rng(3)
    parts = (
        rng.uniform(1e-4, 1e-2, 500),
        2.0 ** np.arange(-126, 121),
        (1 + 2.0**-8) * 2.0 ** np.arange(-30, 30),
        [1.0, 600.0],
    )
    scales = np.concatenate(parts).astype(np.float32)
    codes = np.tile(np.arange(-127, 128, dtype=np.int8), (len(scales), 1))
    words = np.empty(codes.shape, np.uint32 if target == "F32" else np.uint16)
    dequantize(codes, scales[:, None], words, target, Workspace())
    exact = np.multiply(codes.astype(np.float32), scales[:, None], dtype=np.float32)
    assert np.array_equal(words, bits_from_float32(exact, target))


def test_damage_stops_the_stream_before_the_tensor(every_dtype, tmp_path):
    folder = tampering.copy_of(every_dtype, tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, "f32"), bit=3)
    with Container(folder) as container:
        seen = []
        with pytest.raises(ChecksumError) as caught:
            seen += [record.name for record, _ in stream_tensors(container, workers=2)]
    assert caught.value.tensor == "f32"
    assert "f32" not in seen


def test_int8_codes_reach_the_stream_once_per_element(every_dtype):
    with Container(every_dtype) as container:
        quantized = [
            record.name for record in container.manifest.tensors if record.scheme == "int8"
        ]
        assert bool(quantized) == (container.manifest.options.scheme == "int8")
        for name in quantized:
            assert read_codes(container.tensor(name)).size == container.records[name].elements


def test_requests_come_in_their_own_order_as_elements_or_codes(every_dtype):
    with Container(every_dtype) as container:
        expected = {record.name: tensor for record, tensor in stream_tensors(container)}
        names = sorted(expected, reverse=True)
        quantized = {name for name in names if container.records[name].scheme == "int8"}
        requests = [Request(name, "codes" if name in quantized else "weight") for name in names]
        streamed = list(stream_requests(container, requests, workers=2))
        for name, tensor in zip(names, streamed, strict=True):
            if name in quantized:
                codes = read_codes(container.tensor(name)).reshape(tensor.shape)
                assert torch.equal(tensor, torch.from_numpy(codes.copy()))
            else:
                assert _bytes(tensor) == _bytes(expected[name]), name


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_wide_codes_reach_the_stream(tmp_path):
    rng = np.random.default_rng(1)
    values = rng.standard_normal((70, 50)).astype(np.float32)
    write_source(tmp_path / "s", {"w": ("F32", values)}, {"model_type": "none"})
    steps = QuantParams(np.abs(values).max(axis=1) / 3000, wide=True)
    convert(
        tmp_path / "s",
        tmp_path / "c",
        include=("*",),
        choice=ParamsChoice(lambda plan: steps),
    )
    with Container(tmp_path / "c") as container:
        (codes,) = stream_requests(container, [Request("w", "codes")])
        assert codes.dtype == torch.int16
        assert np.array_equal(codes.numpy(), read_codes(container.tensor("w")))
        assert codes.abs().max() > 127


def test_workers_must_be_positive(every_dtype):
    with Container(every_dtype) as container, pytest.raises(UsageError, match="workers"):
        next(stream_tensors(container, workers=0))


def test_a_folder_is_opened_and_closed(tmp_path):
    convert(_source(tmp_path / "s"), tmp_path / "c", scheme="lossless")
    with Container(tmp_path / "c") as container:
        expected = [(record.name, tensor) for record, tensor in stream_tensors(container)]
    for folder in (tmp_path / "c", str(tmp_path / "c")):
        streamed = [(record.name, tensor) for record, tensor in stream_tensors(folder)]
        assert [name for name, _ in streamed] == [name for name, _ in expected]
        assert all(
            torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            for (_, one), (_, other) in zip(streamed, expected, strict=True)
            if one.ndim
        )


def test_a_folder_that_is_no_container(tmp_path):
    with pytest.raises(NotAContainerError, match="no such folder"):
        next(stream_tensors(tmp_path / "nowhere"))


@pytest.mark.parametrize("dtype", ["bfloat16", "cpu", 5, [], object(), torch.int8, torch.bool])
def test_a_dtype_that_is_none_of_floats_is_an_error(tmp_path, dtype):
    _source(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", scheme="lossless")
    with pytest.raises(UsageError, match="float dtype"):
        next(stream_tensors(tmp_path / "out", dtype=dtype))
