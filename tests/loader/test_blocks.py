"""Small tensors of a shard that one job reads: equal bits, faults of one, bounds of blocks."""

from __future__ import annotations

import random
import threading
import time
import weakref
from contextlib import closing

import numpy as np
import pytest
import torch

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, TruncatedError
from codecllm.formats.files import Excerpt
from codecllm.formats.manifest.records import CodedTensor, RawTensor
from codecllm.loader.engine import Request
from codecllm.loader.host import blocks
from codecllm.loader.host import engine as engine_module
from codecllm.loader.host.blocks import SmallTensors
from codecllm.loader.host.engine import HostEngine
from tests.sources import bf16, write_source
from tests.tampering import copy_of

LARGE = "l05_large"


@pytest.fixture(scope="module", params=["lossless", "int8"])
def folder(tmp_path_factory, request):
    """Forty small tensors, plain ones and coded ones, and a large one between them."""
    rng = np.random.default_rng(5)
    tensors = {f"l{n:02}": ("BF16", bf16(rng.standard_normal((48 + n % 3, 64)))) for n in range(40)}
    tensors[LARGE] = ("BF16", bf16(rng.standard_normal((400, 300))))
    tensors["norm"] = ("F32", np.ones(63, np.float32))
    base = tmp_path_factory.mktemp("blocks")
    source = write_source(base / "source", tensors, {"model_type": "none"})
    out = convert(source, base / "container", scheme=request.param).out
    with Container(out) as container:
        assert isinstance(container.records["l13"], CodedTensor)
        assert isinstance(container.records["norm"], RawTensor)
    return out


def _requests(container, dtype=torch.bfloat16):
    return [Request(name, "weight", dtype) for name in container.records]


def _taken(container, order=lambda requests: requests, **options):
    """Returns every tensor, or its error, from a new engine."""
    requests = _requests(container)
    outcomes = {}
    with closing(HostEngine(container, 2, **options)) as engine:
        engine.prefetch(requests)
        for request in order(requests):
            promise = engine.take(request)
            error = promise.error()
            outcomes[request.name] = promise.get() if error is None else error
    return outcomes


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
def test_tensors_of_a_block_have_the_bits_of_single_ones(folder, monkeypatch, budget):
    with Container(folder) as container:
        together = _taken(container, budget=budget)
        monkeypatch.setattr("codecllm.loader.host.engine.SMALL_BYTES", 0)
        alone = _taken(container, budget=budget)
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)


@pytest.mark.parametrize("budget", [1, 20_000, 200_000])
def test_tensors_are_taken_in_any_order(folder, budget):
    with Container(folder) as container:
        expected = _taken(container)
        rng = random.Random(3)
        for _ in range(4):
            taken = _taken(container, lambda all_: rng.sample(all_, len(all_)), budget=budget)
            assert all(torch.equal(taken[name], tensor) for name, tensor in expected.items())


def test_a_block_is_let_go_of_with_the_last_of_its_tensors(folder):
    with Container(folder) as container, closing(HostEngine(container, 1)) as engine:
        requests = _requests(container)
        engine.prefetch(requests)
        tensors = [weakref.ref(engine.take(request).get()) for request in requests[:-5]]
        # The others are taken as another dtype, or not at all as far as the engine knows.
        for request in _requests(container, torch.float32)[-5:]:
            engine.take(request).get()
        end = time.monotonic() + 20
        while any(tensor() is not None for tensor in tensors) and time.monotonic() < end:
            time.sleep(0.01)
        assert not any(tensor() is not None for tensor in tensors)


def test_budget_is_given_back_by_tensors_taken_as_another_dtype(folder, monkeypatch):
    begun = []
    original = engine_module.Together

    def together(requests, size):
        begun.append(size)
        return original(requests, size)

    monkeypatch.setattr(engine_module, "Together", together)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    with Container(folder) as container, closing(HostEngine(container, 1, budget=1)) as engine:
        engine.prefetch(_requests(container))
        for request in _requests(container, torch.float32):
            engine.take(request).get()
        assert len(begun) > 4


def test_threads_take_one_tensor_of_a_block_at_once(folder):
    with Container(folder) as container:
        expected = _taken(container)
        for _ in range(10):
            with closing(HostEngine(container, 2, budget=20_000)) as engine:
                requests, outcomes = _requests(container), []
                engine.prefetch(requests)
                barrier = threading.Barrier(3)

                def take(engine=engine, requests=requests, outcomes=outcomes, barrier=barrier):
                    barrier.wait(20)
                    for request in requests:
                        outcomes.append((request.name, engine.take(request).get()))

                threads = [threading.Thread(target=take) for _ in range(3)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(20)
                assert len(outcomes) == 3 * len(requests)
                assert all(torch.equal(tensor, expected[name]) for name, tensor in outcomes)


def test_an_error_that_no_tensor_is_to_blame_for_fails_the_block(folder, monkeypatch):
    monkeypatch.setattr(engine_module, "decode_alike", lambda *_: 1 / 0)
    with Container(folder) as container:
        outcomes = _taken(container)
    assert isinstance(outcomes.pop(LARGE), torch.Tensor)
    assert {type(outcome) for outcome in outcomes.values()} == {ZeroDivisionError}


def test_closing_fails_blocks_that_are_not_complete(folder, monkeypatch):
    gate = threading.Event()
    read = blocks.Block.read
    monkeypatch.setattr(blocks.Block, "read", lambda *place: gate.wait(20) and read(*place))
    with Container(folder) as container:
        engine = HostEngine(container, 1)
        requests = [request for request in _requests(container) if request.name != LARGE]
        engine.prefetch(requests)
        taken = [engine.take(request) for request in requests]
        closing_thread = threading.Thread(target=engine.close)
        closing_thread.start()
        errors = [one.error() for one in taken]
        gate.set()
        closing_thread.join(20)
        assert not closing_thread.is_alive()
        assert [error for error in errors if "has ended" not in str(error)] == []
        for request in requests:  # a block may have been completed after it was asked for
            error = engine.take(request).error()
            assert error is None or "has ended" in str(error)


def test_tensors_are_read_together(folder, monkeypatch):
    excerpts = []
    original = Container.excerpt

    def excerpt(self, *place):
        excerpts.append(place)
        return original(self, *place)

    monkeypatch.setattr(Container, "excerpt", excerpt)
    with Container(folder) as container:
        _taken(container)
    assert 1 <= len(excerpts) <= 4


@pytest.mark.parametrize("part", ["payload", "chunks"])
def test_a_damaged_tensor_of_a_block_fails_alone(folder, tmp_path, part):
    damaged = copy_of(folder, tmp_path / "c")
    with Container(damaged) as container:
        _, header = container.shard(0)
        place = header.tensors["l13" if part == "payload" else "l13_chunks"].start
        (shard,) = damaged.glob("model-*.safetensors")
        data = bytearray(shard.read_bytes())
        data[place + 1] ^= 1
        shard.write_bytes(data)
    with Container(damaged) as container:
        outcomes = _taken(container)
    assert isinstance(outcomes.pop("l13"), ChecksumError)
    assert all(isinstance(outcome, torch.Tensor) for outcome in outcomes.values())


def test_a_shard_that_ends_early_is_an_error_of_each_tensor_behind(folder, tmp_path):
    short = copy_of(folder, tmp_path / "c")
    (shard,) = short.glob("model-*.safetensors")
    with Container(short) as container:
        _, header = container.shard(0)
        with shard.open("r+b") as file:
            file.truncate(header.tensors["l20"].start)
        outcomes = _taken(container)
    assert isinstance(outcomes["l03"], torch.Tensor)
    assert all(isinstance(outcomes[name], TruncatedError) for name in ("l20", "l21", "norm"))


def test_blocks_are_bounded_and_leave_other_bytes_out(folder, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20_000)
    with Container(folder) as container:
        names = [name for name in container.records if name != LARGE]
        tensors = SmallTensors(container)
        requests = [Request(name) for name in names]
        for request in requests:
            tensors.add(request, 2000)
        found = {id(block): block for block in map(tensors.block, requests)}.values()
        assert sorted(one.name for block in found for one in block.requests) == sorted(names)
        for block in found:
            spans = [container.span(request.name) for request in block.requests]
            assert (block.begin, block.end) == (spans[0][0], spans[-1][1])
            assert block.end - block.begin <= 20_000
            assert isinstance(block.read(container), Excerpt)
        large_begin, large_end = container.span(LARGE)
        assert all(block.end <= large_begin or block.begin >= large_end for block in found)
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
        assert all(block.read(container) is None for block in found)


def test_tensors_that_are_prefetched_later_have_blocks_too(folder):
    with Container(folder) as container:
        tensors = SmallTensors(container)
        for name in ("l03", "l04"):
            tensors.add(Request(name), 2000)
            assert tensors.block(Request(name)).requests == [Request(name)]
