"""Small tensors that are decoded together have the bits, and the faults, of single ones."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from codecllm.converter import convert
from codecllm.formats.codecs import native
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, TruncatedError, UnsupportedEnvironmentError
from codecllm.formats.files import Excerpt
from codecllm.loader.engine import Request
from codecllm.loader.host.alike import decode_alike
from codecllm.loader.host.decode import Workspace
from codecllm.loader.host.engine import HostEngine
from codecllm.loader.host.filling import plan_tensor
from codecllm.loader.torch_tensors import TORCH_DTYPES, torch_dtype
from tests.sources import bf16, write_source
from tests.tampering import copy_of

COUNT = 12


def _tensors(dtype):
    rng = np.random.default_rng(3)
    for number in range(COUNT):
        values = rng.standard_normal((96, 128)).astype(np.float32) * 0.02
        match dtype:
            case "BF16":
                yield f"l{number:02}", (dtype, bf16(values))
            case "BOOL":
                yield f"l{number:02}", (dtype, values > 0)
            case "I64":
                yield f"l{number:02}", (dtype, (values * 500).astype(np.int64))
            case _:
                yield f"l{number:02}", (dtype, values.astype({"F16": "f2", "F32": "f4"}[dtype]))


KINDS = [
    (scheme, codec, dtype)
    for scheme, dtypes in {
        "int8": ["BF16", "F16", "F32"],
        "lossless": ["BF16", "F16", "F32", "I64", "BOOL"],
    }.items()
    for codec in ("zstd", "rans")
    for dtype in dtypes
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def folder(tmp_path_factory, request):
    scheme, codec, dtype = request.param
    base = tmp_path_factory.mktemp("alike")
    source = write_source(base / "source", dict(_tensors(dtype)), {"model_type": "none"})
    include = ["*"] if scheme == "int8" else []  # by default it leaves small tensors alone
    out = convert(source, base / "c", scheme=scheme, codec=codec, include=include).out
    with Container(out) as container:
        assert {record.scheme for record in container.manifest.tensors} == {scheme}
        assert {record.xxh3.tables is None for record in container.manifest.tensors} == {
            codec == "zstd"
        }
    return out


def _excerpt(container):
    file, _ = container.shard(0)
    return Excerpt(file.name, 0, file.read(0, file.size))


def _together(container, requests):
    tensors = decode_alike(container, 0, _excerpt(container), requests)
    # Without the native core nothing is gained, and each tensor is decoded by itself.
    assert len(tensors) == (len(requests) if native.core is not None else 0)
    return tensors


def _alone(container, request):
    plan, workspace = plan_tensor(container.tensor(request.name), request), Workspace()
    for job in plan.jobs:
        job(workspace)
    return plan.tensor


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_have_the_bits_of_single_ones(folder, dtype):
    with Container(folder) as container:
        requests = [Request(name, "weight", dtype) for name in container.records]
        for request, tensor in _together(container, requests).items():
            expected = _alone(container, request)
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            assert tensor.untyped_storage().nbytes() == expected.numel() * expected.itemsize
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def test_codes_are_those_of_single_ones(folder):
    with Container(folder) as container:
        if container.manifest.options.scheme != "int8":
            return  # the other kinds have no codes
        requests = [Request(name, "codes") for name in container.records]
        for request, tensor in _together(container, requests).items():
            assert torch.equal(tensor, _alone(container, request))


def test_without_the_native_core_each_has_the_same_bits(folder, monkeypatch):
    with Container(folder) as container:
        requests = [Request(name) for name in container.records]
        expected = [_alone(container, request) for request in requests]
        monkeypatch.setattr(native, "core", None)
        assert decode_alike(container, 0, _excerpt(container), requests) == {}
        with closing(HostEngine(container, 1)) as engine:
            engine.prefetch(requests)
            for request, tensor in zip(requests, expected, strict=True):
                assert torch.equal(engine.take(request).get(), tensor)


def test_a_type_that_torch_lacks_is_named_with_its_tensor(folder, monkeypatch):
    with Container(folder) as container:
        if container.manifest.options.scheme != "lossless":
            return  # codes become floats that every torch has
        requests = [Request(name) for name in container.records]
        monkeypatch.delitem(TORCH_DTYPES, container.records["l05"].dtype)
        assert decode_alike(container, 0, _excerpt(container), requests) == {}
        with pytest.raises(UnsupportedEnvironmentError, match="no dtype for") as caught:
            torch_dtype(container.records["l05"].dtype, "l05")
        assert caught.value.tensor == "l05"


@pytest.mark.parametrize("part", ["", "_chunks", "_shape", "_scale", "_tables"])
def test_a_damaged_tensor_fails_alone_and_by_name(folder, tmp_path, part):
    damaged = copy_of(folder, tmp_path / "c")
    with Container(damaged) as container:
        _, header = container.shard(0)
        entry = header.tensors.get(f"l05{part}")
        if entry is None:
            return  # the kind has no such side tensor
        requests = [Request(name) for name in container.records]
        expected = [_alone(container, request) for request in requests]
        (shard,) = damaged.glob("model-*.safetensors")
        data = bytearray(shard.read_bytes())
        data[entry.start + (entry.end - entry.start) // 2] ^= 1
        shard.write_bytes(data)
        with closing(HostEngine(container, 1)) as engine:
            engine.prefetch(requests)
            outcomes = [engine.take(request) for request in requests]
            error = outcomes.pop(5).error()
            assert isinstance(error, ChecksumError)
            assert "l05" in str(error)
            del expected[5]
            for outcome, tensor in zip(outcomes, expected, strict=True):
                assert torch.equal(outcome.get(), tensor)


@pytest.mark.parametrize("part", ["", "_chunks", "_shape", "_scale", "_tables"])
def test_a_shard_that_is_cut_names_itself_and_the_tensor(folder, tmp_path, part):
    short = copy_of(folder, tmp_path / "c")
    (shard,) = short.glob("model-*.safetensors")
    with Container(short) as container:
        _, header = container.shard(0)
        entry = header.tensors.get(f"l05{part}")
        if entry is None:
            return  # the kind has no such side tensor
        with shard.open("r+b") as file:
            file.truncate(entry.start + 1)
        with closing(HostEngine(container, 1)) as engine:
            error = engine.take(Request("l05")).error()
        assert isinstance(error, TruncatedError)
        assert (error.file, error.tensor) == (shard.name, "l05")
