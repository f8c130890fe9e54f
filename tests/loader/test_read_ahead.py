"""The pipeline under every load, with runs that a test can hold up: order, bounds, faults, ends."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from codecllm.formats.errors import ChecksumError
from codecllm.formats.files import SafeFile
from codecllm.formats.stored_tensor import PlainTensor
from codecllm.loader import torch_tensors
from codecllm.loader.host.pool import DecodePool
from codecllm.loader.host.read_ahead import ReadAhead, Request
from codecllm.loader.torch_tensors import Announcer, Filling

RUN_BYTES = 1000


class _Bench:
    """Tensors of four runs each; counts what happens and holds decoding up while `gate` is closed."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.started, self.read, self.decoded = [], 0, 0
        self.on_start = self.on_decode = lambda: None

    def request(self, name, size=RUN_BYTES, fails=None):
        def start():
            self.on_start()
            with self.lock:
                self.started.append(name)
            tensor = torch.zeros(4, dtype=torch.int64)
            return Filling(tensor, [_Run(self, tensor, part, name, fails) for part in range(4)])

        return Request(name, size, start)


class _Run:
    place, size = None, RUN_BYTES

    def __init__(self, bench, tensor, part, name, fails):
        self.bench, self.tensor, self.part, self.name, self.fails = bench, tensor, part, name, fails

    def read(self, buffer):
        if self.fails == "read":
            raise ChecksumError("unreadable", tensor=str(self.name))
        with self.bench.lock:
            self.bench.read += 1
        view = memoryview(buffer)[: self.size]
        view[:] = bytes([self.name * 4 + self.part]) * self.size
        return view

    def decode(self, stored, workspace):
        self.bench.on_decode()
        assert self.bench.gate.wait(20)
        assert len(set(stored)) == 1, "another run's bytes came into this buffer"
        if self.fails == "decode" and self.part == 1:
            raise ChecksumError("damaged", tensor=str(self.name))
        self.tensor[self.part] = stored[0]
        with self.bench.lock:
            self.bench.decoded += 1


def _expected(name):
    return torch.arange(name * 4, name * 4 + 4)


def _settled(count):
    """Waits until a count does not change any more; returns it."""
    last = -1
    while (now := count()) != last:
        last = now
        time.sleep(0.1)
    return now


@pytest.mark.parametrize(
    "order",
    [range(30), reversed(range(30)), [*range(15, 30), *range(15)], [7, 3, 29, 0, *range(10, 20)]],
)
@pytest.mark.parametrize("budget", [1, 3 * RUN_BYTES, 1 << 30])
def test_tensors_are_taken_in_any_order_once_each(order, budget):
    bench, order = _Bench(), list(order)
    with DecodePool(2) as pool, ReadAhead(pool, budget) as ahead:
        ahead.expect(bench.request(name) for name in range(30))
        for name in order:
            assert torch.equal(ahead.result(ahead.take(bench.request(name))), _expected(name))
    assert len(bench.started) == len(set(bench.started))


def test_tensors_are_begun_in_the_order_of_the_files():
    bench = _Bench()
    with DecodePool(1) as pool, ReadAhead(pool) as ahead:
        ahead.expect(bench.request(name) for name in range(40))
        _settled(lambda: bench.decoded)
    assert bench.started == list(range(40))


def test_reading_follows_whoever_takes_in_another_order():
    bench = _Bench()
    with DecodePool(1) as pool, ReadAhead(pool, budget=1) as ahead:
        ahead.expect(bench.request(name) for name in range(40))
        _settled(lambda: bench.decoded)
        for name in (20, 21, 22):
            ahead.result(ahead.take(bench.request(name)))
        ahead.result(ahead.take(bench.request(0)))
        _settled(lambda: bench.decoded)
    assert bench.started[-1] == 23


def test_what_is_read_and_not_decoded_is_one_run_a_thread():
    bench = _Bench()
    bench.gate.clear()
    with DecodePool(2) as pool, ReadAhead(pool) as ahead:
        ahead.expect(bench.request(name) for name in range(30))
        ahead.take(bench.request(30))
        assert _settled(lambda: bench.read) == 2
        bench.gate.set()
        for name in range(30):
            assert torch.equal(ahead.result(ahead.take(bench.request(name))), _expected(name))


@pytest.mark.parametrize("helps", [False, True])
def test_before_the_first_take_tensors_are_planned_and_one_thread_works(helps):
    bench = _Bench()
    bench.gate.clear()
    with DecodePool(4) as pool, ReadAhead(pool, takers_help=helps) as ahead:
        ahead.expect(bench.request(name) for name in range(30))
        assert bench.started == list(range(30))
        assert _settled(lambda: bench.read) == 1
        made = ahead.take(bench.request(0))
        assert _settled(lambda: bench.read) == 4 - helps, "a place is left for the taker"
        if helps:
            taker = threading.Thread(target=ahead.result, args=(made,))
            taker.start()
            assert _settled(lambda: bench.read) == 4
        bench.gate.set()
        assert torch.equal(ahead.result(made), _expected(0))
        if helps:
            taker.join(20)


def test_only_one_taker_helps():
    bench, threads = _Bench(), set()
    with DecodePool(2) as pool, ReadAhead(pool, takers_help=True) as ahead:
        bench.on_decode = lambda: threads.add(threading.get_ident())
        ahead.expect(bench.request(name) for name in range(60))
        made = [ahead.take(bench.request(name)) for name in range(60)]
        takers = [
            threading.Thread(target=ahead.result, args=(made[name],)) for name in range(0, 60, 10)
        ]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join(20)
        assert [
            torch.equal(ahead.result(tensor), _expected(name)) for name, tensor in enumerate(made)
        ] == [True] * 60
    assert len(threads) <= 2


@pytest.mark.parametrize("endless", [True, False])
def test_what_prepares_ends_with_the_first_take_and_nothing_is_decoded_meanwhile(endless):
    bench, steps, step = _Bench(), [], threading.Event()

    def prepare():
        assert bench.started == list(range(30))
        while endless or not steps:
            steps.append(bench.read)
            step.wait(20)
            yield

    with DecodePool(2) as pool, ReadAhead(pool, takers_help=True) as ahead:
        ahead.expect((bench.request(name) for name in range(30)), prepare)
        assert _settled(lambda: len(steps)) == 1
        made = ahead.take(bench.request(0))
        taker = threading.Thread(target=ahead.result, args=(made,))
        taker.start()
        assert _settled(lambda: bench.read) == 0, "a step is under way"
        step.set()
        assert torch.equal(ahead.result(made), _expected(0))
        taker.join(20)
        assert steps == [0]


def test_what_prepares_may_fail():
    bench, steps = _Bench(), []

    def prepare():
        steps.append(1)
        raise OSError("no memory to touch")
        yield

    with DecodePool(2) as pool, ReadAhead(pool) as ahead:
        ahead.expect((bench.request(name) for name in range(10)), prepare)
        assert _settled(lambda: len(steps)) == 1
        assert all(
            torch.equal(ahead.result(ahead.take(bench.request(name))), _expected(name))
            for name in range(10)
        )
    assert steps == [1]


@pytest.mark.parametrize("taken", [False, True])
def test_only_the_first_expectation_is_prepared_and_nothing_is_decoded_until_that_ends(taken):
    bench, steps, step = _Bench(), [], threading.Event()

    def prepare(number):
        steps.append(number)
        step.wait(20)
        yield

    with DecodePool(2) as pool, ReadAhead(pool) as ahead:
        for number in range(2):
            ahead.expect(
                (bench.request(10 * number + name) for name in range(10)),
                lambda number=number: prepare(number),
            )
            assert _settled(lambda: len(steps)) == 1
            if taken:
                ahead.take(bench.request(number))
        assert _settled(lambda: bench.read) == 0
        step.set()
        left = range(2 if taken else 0, 20)
        assert all(
            torch.equal(ahead.result(ahead.take(bench.request(name))), _expected(name))
            for name in left
        )
    assert steps == [0]


@pytest.mark.parametrize("when", ["expected", "helping"])
def test_ctrl_c_reaches_whoever_plans_or_helps(when):
    bench, interrupted = _Bench(), threading.Event()

    def interrupt():
        if threading.current_thread() is threading.main_thread():
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(20)

    with DecodePool(2) as pool:
        ahead = ReadAhead(pool, takers_help=True)
        if when == "expected":
            bench.on_start = interrupt
            with pytest.raises(KeyboardInterrupt):
                ahead.expect(bench.request(name) for name in range(30))
        else:
            bench.on_decode = interrupt
            ahead.expect(bench.request(name) for name in range(30))
            with pytest.raises(KeyboardInterrupt):
                [ahead.result(ahead.take(bench.request(name))) for name in range(30)]
        ahead.close()
    with pytest.raises(RuntimeError, match="has ended"):
        ahead.result(ahead.take(bench.request(31)))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("budget", "ready"), [(1 << 30, 30), (5 * RUN_BYTES, 5)])
def test_where_takers_help_whoever_waits_wakes_up_once_the_budget_is_made(budget, ready, workers):
    bench = _Bench()
    bench.gate.clear()
    threading.Timer(0.2, bench.gate.set).start()
    with DecodePool(workers) as pool, ReadAhead(pool, budget, takers_help=True) as ahead:
        ahead.expect(bench.request(name) for name in range(30))
        assert torch.equal(ahead.result(ahead.take(bench.request(0))), _expected(0))
        assert bench.decoded >= 4 * ready


def test_elsewhere_whoever_waits_wakes_up_for_its_own_tensor():
    bench, others = _Bench(), threading.Event()
    bench.on_decode = lambda: bench.decoded < 4 or others.wait(20)
    with DecodePool(2) as pool, ReadAhead(pool) as ahead:
        ahead.expect(bench.request(name) for name in range(30))
        assert torch.equal(ahead.result(ahead.take(bench.request(0))), _expected(0))
        assert bench.decoded < 10
        others.set()


@pytest.mark.parametrize("helps", [False, True])
def test_an_error_is_not_waited_for_longer_than_it_takes(helps):
    bench = _Bench()
    bench.gate.clear()
    with DecodePool(2) as pool, ReadAhead(pool, takers_help=helps) as ahead:
        ahead.expect(bench.request(name, fails="read" if name == 0 else None) for name in range(30))
        with pytest.raises(ChecksumError):
            ahead.result(ahead.take(bench.request(0)))
        assert not bench.decoded
        bench.gate.set()


@pytest.mark.parametrize("helps", [False, True])
def test_closing_from_another_thread_lets_no_taker_wait(helps):
    """Several takers wait while the load and its pool are closed: each gets its tensor or the error of the end."""
    for turn in range(60):
        bench, ends = _Bench(), []

        def take(names, ahead, bench=bench, ends=ends):
            try:
                for name in names:
                    ahead.result(ahead.take(bench.request(name)))
                ends.append("taken")
            except RuntimeError as exc:
                ends.append(str(exc))

        with DecodePool(4) as pool:
            ahead = ReadAhead(pool, budget=3 * RUN_BYTES, takers_help=helps)
            ahead.expect(
                (bench.request(name) for name in range(30)), lambda turn=turn: iter(range(turn))
            )
            takers = [
                threading.Thread(target=take, args=(range(first, 30, 3), ahead), daemon=True)
                for first in range(3)
            ]
            for taker in takers:
                taker.start()
            time.sleep(turn * 2e-4)
            ahead.close()
        for taker in takers:
            taker.join(20)
        assert len(ends) == 3, turn
        assert set(ends) <= {
            "taken",
            "the load has ended",
            "the pool of decoding threads is closed",
        }


@pytest.mark.parametrize(("helps", "workers"), [(False, 1), (True, 1), (True, 2)])
def test_a_pool_that_is_closed_first_lets_no_taker_wait(helps, workers):
    bench, errors, busy = _Bench(), [], threading.Event()
    pool = DecodePool(workers)
    for _ in range(workers):
        pool.submit(lambda _: busy.wait(20))
    ahead = ReadAhead(pool, takers_help=helps)
    ahead.expect((bench.request(name) for name in range(10)), lambda: iter(range(3)))

    def take():
        try:
            ahead.result(ahead.take(bench.request(1)))
        except RuntimeError as exc:
            errors.append(str(exc))

    taker = threading.Thread(target=take)
    taker.start()
    threading.Timer(0.2, busy.set).start()
    pool.close()
    taker.join(20)
    assert not taker.is_alive()
    assert errors in (["the load has ended"], ["the pool of decoding threads is closed"])


def test_the_budget_bounds_tensors_that_nobody_took():
    bench = _Bench()
    with DecodePool(2) as pool, ReadAhead(pool, budget=5 * RUN_BYTES) as ahead:
        ahead.expect(bench.request(name) for name in range(30))
        assert _settled(lambda: len(bench.started)) == 5
        ahead.result(ahead.take(bench.request(2)))
        assert _settled(lambda: len(bench.started)) == 6
        ahead.drop(0)
        assert _settled(lambda: len(bench.started)) == 7


def test_a_tensor_larger_than_the_budget_is_made():
    bench = _Bench()
    with DecodePool(1) as pool, ReadAhead(pool, budget=10) as ahead:
        ahead.expect([bench.request(0, size=1 << 40), bench.request(1)])
        assert _settled(lambda: len(bench.started)) == 1
        assert torch.equal(ahead.result(ahead.take(bench.request(0))), _expected(0))
        assert torch.equal(ahead.result(ahead.take(bench.request(1))), _expected(1))


@pytest.mark.parametrize("fails", ["read", "decode"])
def test_a_damaged_tensor_fails_alone(fails):
    bench = _Bench()
    with DecodePool(2) as pool, ReadAhead(pool) as ahead:
        ahead.expect(bench.request(name, fails=fails if name == 4 else None) for name in range(20))
        for name in range(20):
            made = ahead.take(bench.request(name))
            if name == 4:
                with pytest.raises(ChecksumError):
                    ahead.result(made)
            else:
                assert torch.equal(ahead.result(made), _expected(name))


def test_closing_lets_nobody_wait():
    bench = _Bench()
    bench.gate.clear()
    with DecodePool(1) as pool:
        ahead = ReadAhead(pool)
        ahead.expect(bench.request(name) for name in range(30))
        waiting = [ahead.take(bench.request(name)) for name in (0, 29, 31)]
        time.sleep(0.1)
        assert not any(request.made for request in waiting)
        ahead.close()
        bench.gate.set()
        for made in [*waiting, ahead.take(bench.request(32))]:
            with pytest.raises(RuntimeError, match="has ended"):
                ahead.result(made)


def test_what_was_made_can_be_taken_after_the_end():
    bench = _Bench()
    with DecodePool(2) as pool:
        ahead = ReadAhead(pool, budget=3 * RUN_BYTES)
        ahead.expect(bench.request(name) for name in range(30))
        ahead.result(ahead.take(bench.request(0)))
        while bench.decoded < 16:  # the budget, and the one that was taken
            time.sleep(0.01)
        ahead.close()
    for name in range(1, 4):
        assert torch.equal(ahead.result(ahead.take(bench.request(name))), _expected(name))
    with pytest.raises(RuntimeError, match="has ended"):
        ahead.result(ahead.take(bench.request(4)))


def test_the_kernel_is_told_ahead_once_for_every_byte(tmp_path, monkeypatch):
    """Tensors of 1 MB in the order of their file, then some far behind and in front."""
    told = []
    monkeypatch.setattr(torch_tensors, "ANNOUNCED_BYTES", 8 << 20)
    monkeypatch.setattr(
        torch_tensors.os,
        "posix_fadvise",
        lambda _, begin, size, advice: told.append((begin, begin + size)),
    )
    (tmp_path / "f").write_bytes(b"x")
    with SafeFile(tmp_path, "f") as file:
        announce = Announcer()
        for place in [*range(40), 90, 10]:
            told_before = len(told)
            announce(PlainTensor(SimpleNamespace(source_bytes=1 << 20), file, place << 20))
            ends = [end for _, end in told]
            assert place == 10 or max(ends) >= (place + 5) << 20, (
                "half of what is announced lies ahead at least"
            )
            assert len(told) <= told_before + 1
        announce(PlainTensor(SimpleNamespace(source_bytes=0), file, 0))
    assert told[0] == (0, 9 << 20)
    in_order = [span for span in told if span[0] < 80 << 20]
    assert all(left[1] == right[0] for left, right in pairwise(in_order[: len(told) - 2]))
    assert len(told) < 14
    assert told[-2:] == [(90 << 20, 99 << 20), (10 << 20, 19 << 20)]


def test_an_expected_tensor_is_kept_by_its_taker_alone():
    import gc
    import weakref

    bench = _Bench()
    with DecodePool(1) as pool, ReadAhead(pool) as ahead:
        ahead.expect([bench.request(0), bench.request(1)])
        tensor = ahead.result(ahead.take(bench.request(0)))
        gone = weakref.ref(tensor)
        _settled(lambda: bench.decoded)
        del tensor
        gc.collect()
        assert gone() is None
