"""The CPU's engine, with jobs that a test can hold up: order, budget, faults, ends."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
import weakref
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from codecllm.formats.errors import ChecksumError
from codecllm.formats.stored_tensor import PlainTensor
from codecllm.loader.engine import Request
from codecllm.loader.host import engine as engine_module
from codecllm.loader.host.engine import HostEngine
from codecllm.loader.host.filling import PendingTensor

SIZE = 100_000  # not small: no tensor waits for those beside it
LARGE = "100"


class _Bench:
    """A container of tensors of four jobs each; counts and holds jobs up while `gate` is closed."""

    def __init__(self, monkeypatch):
        self.gate = threading.Event()
        self.gate.set()
        self.begun, self.decoded, self.faults = [], [], {}
        self.waiting = 0
        self.records = {str(n): SimpleNamespace(elements=SIZE, dtype="I8") for n in range(99)}
        self.records[LARGE] = SimpleNamespace(elements=1 << 40, dtype="I8")
        monkeypatch.setattr(engine_module, "plan_tensor", self._plan)

    def tensor(self, name):
        if self.faults.get(name) == "open":
            raise ChecksumError("side data are damaged", tensor=name)
        return PlainTensor(SimpleNamespace(source_bytes=0, name=name), None, 0)

    def engine(self, threads=2, **options):
        return HostEngine(self, threads, **options)

    def _plan(self, source, request, allocate):
        self.begun.append(int(request.name))
        tensor = torch.full((4,), -1)
        jobs = [lambda _, part=part: self._decode(request.name, part, tensor) for part in range(4)]
        return PendingTensor(tensor, jobs if self.faults.get(request.name) != "empty" else [])

    def _decode(self, name, part, tensor):
        self.waiting += 1
        assert self.gate.wait(20)
        if self.faults.get(name) == "decode" and part == 1:
            raise ChecksumError("damaged", tensor=name)
        tensor[part] = int(name) * 4 + part
        self.decoded.append((int(name), part))


@pytest.fixture
def bench(monkeypatch):
    return _Bench(monkeypatch)


def _requests(names):
    return [Request(str(name)) for name in names]


def _settled(count):
    """Waits until a count does not change any more; returns it."""
    last = -1
    while (now := count()) != last:
        last = now
        time.sleep(0.15)
    return now


def _until(ready):
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def _is(tensor, name):
    return tensor.tolist() == list(range(name * 4, name * 4 + 4))


@pytest.mark.parametrize(
    "order", [[*range(30)], [*reversed(range(30))], [*range(15, 30), *range(15)], [7, 3, 29, 0]]
)
@pytest.mark.parametrize("budget", [1, 3 * SIZE, 1 << 30])
def test_tensors_are_taken_in_any_order_and_decoded_once(bench, order, budget):
    with closing(bench.engine(budget=budget)) as engine:
        engine.prefetch(_requests(range(30)))
        promises = [engine.take(Request(str(name))) for name in order]
        assert all(_is(promise.get(), name) for promise, name in zip(promises, order, strict=True))
    assert len(bench.decoded) == len(set(bench.decoded))


def test_prefetched_tensors_are_begun_in_their_order_within_the_budget(bench):
    with closing(bench.engine(budget=5 * SIZE)) as engine:
        engine.prefetch(_requests(range(30)))
        assert _settled(lambda: len(bench.begun)) == 5
        engine.take(Request("2")).get()
        assert _settled(lambda: len(bench.begun)) == 6
        engine.prefetch(_requests(range(30)))  # known already
        assert _settled(lambda: len(bench.begun)) == 6
    assert bench.begun == list(range(6))


@pytest.mark.parametrize(("cores", "at_work"), [(2, 1), (3, 2)])
def test_the_caller_has_a_core_until_it_takes_a_tensor(bench, monkeypatch, cores, at_work):
    monkeypatch.setattr(engine_module, "cores", lambda: cores)
    bench.gate.clear()
    with closing(bench.engine()) as engine:
        engine.prefetch(_requests(range(3)))
        _until(lambda: bench.waiting == at_work)
        time.sleep(0.1)
        assert bench.waiting == at_work
        taken = engine.take(_requests([0])[0])
        _until(lambda: bench.waiting == 2)
        bench.gate.set()
        assert _is(taken.get(), 0)


def test_a_tensor_larger_than_the_budget_is_decoded_alone(bench):
    with closing(bench.engine(budget=10)) as engine:
        engine.prefetch(_requests([LARGE, 1]))
        assert _settled(lambda: len(bench.begun)) == 1
        assert _is(engine.take(Request(LARGE)).get(), 100)
        assert _is(engine.take(Request("1")).get(), 1)


def test_a_tensor_that_was_not_prefetched_goes_first(bench):
    bench.gate.clear()
    with closing(bench.engine(threads=1)) as engine:
        engine.prefetch(_requests(range(10)))
        _settled(lambda: len(bench.begun))
        promise = engine.take(Request("50"))
        _settled(lambda: len(bench.begun))
        bench.gate.set()
        promise.get()
    assert bench.decoded.index((50, 3)) <= 5, bench.decoded


def test_a_tensor_taken_as_another_dtype_gives_its_place_in_the_budget_up(bench):
    with closing(bench.engine(budget=2 * SIZE)) as engine:
        engine.prefetch(_requests(range(6)))
        assert _settled(lambda: len(bench.begun)) == 2
        for name in ("0", "5"):
            engine.take(Request(name, dtype=torch.int64)).get()
        _settled(lambda: len(bench.begun))
    assert bench.begun == [0, 1, 0, 2, 5]


@pytest.mark.parametrize("fault", ["open", "decode"])
def test_a_damaged_tensor_fails_alone(bench, fault):
    bench.faults["4"] = fault
    with closing(bench.engine()) as engine:
        engine.prefetch(_requests(range(12)))
        promises = [engine.take(request) for request in _requests(range(12))]
        with pytest.raises(ChecksumError, match="'4'"):
            promises[4].get()
        assert all(_is(promise.get(), n) for n, promise in enumerate(promises) if n != 4)


def test_a_tensor_without_jobs_is_complete_at_once(bench):
    bench.faults["3"] = "empty"
    with closing(bench.engine()) as engine:
        assert engine.take(Request("3")).get().tolist() == [-1] * 4


def test_an_error_that_no_tensor_is_to_blame_for_fails_all(bench, monkeypatch):
    with closing(bench.engine()) as engine:
        monkeypatch.setattr(HostEngine, "_size", lambda *_: 1 / 0)
        engine.prefetch(_requests(range(3)))
        for name in ("0", "2", "9"):
            with pytest.raises(ZeroDivisionError):
                engine.take(Request(name)).get()


def test_closing_fails_tensors_that_are_not_complete_and_leaves_the_others(bench):
    engine = bench.engine(budget=3 * SIZE)
    engine.prefetch(_requests(range(30)))
    _settled(lambda: len(bench.decoded))
    bench.gate.clear()
    waiting = [engine.take(request) for request in _requests([20, 40])]
    _settled(lambda: len(bench.begun))
    threading.Timer(0.1, bench.gate.set).start()
    engine.close()
    engine.close()
    for promise in [*waiting, *map(engine.take, _requests([4, 41]))]:
        with pytest.raises(RuntimeError, match="has ended"):
            promise.get()
    assert all(_is(engine.take(Request(str(n))).get(), n) for n in range(3))


def test_closing_from_another_thread_lets_no_taker_wait(bench):
    for turn in range(40):
        engine, ends = bench.engine(threads=3, budget=3 * SIZE), []

        def take(names, engine=engine, ends=ends):
            try:
                for request in _requests(names):
                    engine.take(request).get()
                ends.append("taken")
            except RuntimeError as exc:
                ends.append(str(exc))

        engine.prefetch(_requests(range(30)))
        takers = [threading.Thread(target=take, args=(range(n, 30, 3),)) for n in range(3)]
        for taker in takers:
            taker.start()
        time.sleep(turn * 3e-4)
        engine.close()
        for taker in takers:
            taker.join(20)
        assert len(ends) == 3, turn
        assert set(ends) <= {"taken", "the load has ended"}


def test_threads_that_take_one_tensor_at_once_share_it(bench):
    bench.gate.clear()
    with closing(bench.engine()) as engine:
        engine.prefetch(_requests(range(3)))
        promises = [engine.take(Request("1")) for _ in range(2)]
        bench.gate.set()
        first, second = (promise.get() for promise in promises)
        assert _is(second, 1)
        assert first is second or bench.begun.count(1) == 2


def test_the_engine_keeps_no_tensor_that_was_taken(bench):
    with closing(bench.engine(threads=1)) as engine:
        engine.prefetch(_requests(range(2)))
        tensor = engine.take(Request("0")).get()
        gone = weakref.ref(tensor)
        _settled(lambda: len(bench.decoded))
        del tensor
        gc.collect()
        assert gone() is None


def test_a_load_does_not_go_on_in_a_forked_process(bench):
    with closing(bench.engine()) as engine:
        engine.take(Request("0")).get()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
            child = os.fork()
        if not child:
            try:
                engine.take(Request("1"))
            except RuntimeError:
                engine.close()
                os._exit(0)
            os._exit(3)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
