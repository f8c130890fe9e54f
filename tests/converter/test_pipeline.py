"""Threads of a conversion: order, errors, and the same bytes at any number of workers."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import threading
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter import options as converter_options
from codecllm.converter.encode.buffers import Buffers
from codecllm.converter.options import ConvertOptions
from codecllm.converter.write import tensor_writer
from codecllm.converter.write.backlog import Backlog
from codecllm.converter.write.digests import OrderedDigest
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import NonFiniteWeightError
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.shards.shard_writer import PlannedTensor, ShardWriter
from tests.sources import bf16, write_source

PLANNED = [PlannedTensor("w", DTYPES["U8"], (10_000_000,), 10_000_000)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(9)
    tensors = {
        f"layers.{n}.weight": ("BF16", bf16(rng.standard_normal((300, 512)))) for n in range(9)
    }
    tensors["layers.3.weight"][1][7, 7] = 0x7F80  # infinite: stored lossless
    tensors["big.weight"] = ("BF16", bf16(rng.standard_normal((3000, 1024))))
    tensors["ids"] = ("I64", rng.integers(0, 1 << 60, 3000))
    return write_source(tmp_path_factory.mktemp("source") / "model", tensors, {})


@pytest.mark.parametrize("codec", ["zstd", "rans"])
def test_bytes_do_not_depend_on_the_workers(source, tmp_path, codec):
    written = []
    for workers in (1, 2, 16):  # the last in four lanes
        out = tmp_path / f"{workers}"
        options = {"codec": codec, "non_finite": "lossless", "max_shard_bytes": 900_000}
        convert(source, out, workers=workers, **options)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1] == written[2]
    assert sum(name.endswith(".safetensors") for name in written[0]) > 2


@pytest.mark.parametrize("counted", [1, 2, 3, 4])
def test_entropies_do_not_depend_on_when_they_are_computed(source, tmp_path, monkeypatch, counted):
    """`big.weight` has three blocks: the last batch is empty, full, or in between."""
    manifests = []
    for blocks in (64, counted):
        monkeypatch.setattr(tensor_writer, "_BLOCKS_COUNTED", blocks)
        out = convert(source, tmp_path / str(blocks), non_finite="lossless").out
        manifests.append((out / MANIFEST_NAME).read_bytes())
    assert manifests[0] == manifests[1]


@pytest.fixture(scope="module")
def faulty_source(tmp_path_factory):
    """Six shards of 200 kB, of which those of tensors 2, 3 and 5 cannot be int8."""
    rng = np.random.default_rng(10)
    tensors = {f"t.{n}.weight": ("BF16", bf16(rng.standard_normal((400, 512)))) for n in range(6)}
    for number in (2, 3, 5):
        tensors[f"t.{number}.weight"][1][0, 0] = 0x7F80
    return write_source(tmp_path_factory.mktemp("source") / "faulty", tensors, {})


def test_of_several_shards_that_fail_the_first_is_named(faulty_source, tmp_path):
    for workers in (1, 8, 16, 16, 16):
        with pytest.raises(NonFiniteWeightError) as caught:
            convert(faulty_source, tmp_path / "out", workers=workers, max_shard_bytes=250_000)
        assert caught.value.tensor == "t.2.weight"
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("calls", [1, 5])
@pytest.mark.parametrize("workers", [1, 16])
def test_an_interruption_ends_all_threads(source, tmp_path, workers, calls):
    before, seen = threading.active_count(), []

    def interrupt(*event):
        seen.append(event)
        if len(seen) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            source,
            tmp_path / "out",
            workers=workers,
            non_finite="lossless",
            max_shard_bytes=900_000,
            progress=interrupt,
        )
    assert threading.active_count() == before
    assert not (tmp_path / "out").exists()


def test_a_backlog_waits_for_room_and_ends_when_it_is_closed():
    backlog, added = Backlog(10), []
    backlog.add(50)  # more than there is room for, alone

    def work():
        for size in (6, 4, 1):
            backlog.add(size)
            added.append(size)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        with pytest.raises(FutureTimeout):
            future.result(0.05)
        assert added == []
        backlog.done(50)
        with pytest.raises(FutureTimeout):
            future.result(0.05)
        assert added == [6, 4]
        backlog.close()
        with pytest.raises(CancelledError):
            future.result(5)
    assert added == [6, 4]


def test_memory_is_used_again_and_never_twice_at_a_time():
    buffers = Buffers()
    taken = [buffers.take(size) for size in (1, 70_000, 70_001, 200_000)]
    assert len({buffer.ctypes.data for buffer in taken}) == 4
    assert [buffer.size for buffer in taken] == [1 << 16, 1 << 17, 1 << 17, 1 << 18]
    for buffer in taken:
        buffers.give(buffer)
    again = [buffers.take(size) for size in (100_000, 131_072)]
    assert {buffer.ctypes.data for buffer in again} == {b.ctypes.data for b in taken[1:3]}
    assert buffers.take(100_000).ctypes.data not in {buffer.ctypes.data for buffer in taken}


@pytest.mark.parametrize("workers", [1, 16])
def test_no_buffer_waits_for_the_garbage_collector(source, tmp_path, monkeypatch, workers):
    take, taken = Buffers.take, []

    def noted(self, size):
        buffer = take(self, size)
        taken.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(Buffers, "take", noted)
    gc.disable()
    try:
        convert(source, tmp_path / "out", workers=workers, non_finite="lossless")
        alive = [buffer() for buffer in taken if buffer() is not None]
    finally:
        gc.enable()
    assert taken
    assert alive == []


@pytest.mark.parametrize("calls", [1, 4, 12])
@pytest.mark.parametrize("workers", [3, 16])
def test_a_full_disk_ends_the_conversion(source, tmp_path, monkeypatch, workers, calls):
    write, lock, count = os.pwritev, threading.Lock(), 0

    def fill(*arguments):
        nonlocal count
        with lock:
            count += 1
            if count >= calls:
                raise OSError(errno.ENOSPC, "no space")
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", fill)
    options = {"non_finite": "lossless", "max_shard_bytes": 900_000}
    with pytest.raises(OSError, match="no space"):
        convert(source, tmp_path / "out", workers=workers, **options)
    assert not (tmp_path / "out").exists()


def test_pieces_of_a_write_are_put_together(tmp_path, monkeypatch):
    write = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: write(fd, [views[0][:7]], at))
    parts = [bytes([n]) * n for n in (1, 6, 7, 8, 0, 30)]
    shard = ShardWriter(tmp_path / "s", PLANNED, {})
    shard.write(*parts)
    shard.end_tensor("w", "U8", (52,))
    shard.finish()
    assert (tmp_path / "s").read_bytes().endswith(b"".join(parts))


def test_a_shard_written_by_another_thread_is_the_same(tmp_path):
    rng = np.random.default_rng(1)
    parts = [rng.bytes(int(rng.integers(1, 5000))) for _ in range(200)]
    with ThreadPoolExecutor(1) as executor:
        for name, pool in (("one", None), ("two", executor)):
            shard = ShardWriter(tmp_path / name, PLANNED, {}, pool)
            mark = shard.mark()
            shard.write(*parts[::2])
            shard.rollback(mark)
            for part in parts:
                shard.write(part)
            shard.end_tensor("w", "U8", (sum(map(len, parts)),))
            shard.finish()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_shard_can_be_given_up_while_it_is_written(tmp_path):
    gate = threading.Event()
    executor = ThreadPoolExecutor(1)
    executor.submit(gate.wait)
    shard = ShardWriter(tmp_path / "s", PLANNED, {}, executor)
    for _ in range(5):
        shard.write(bytes(100))
    gate.set()
    executor.shutdown(cancel_futures=True)
    shard.abort()


def test_digests_run_side_by_side_and_in_order():
    rng = np.random.default_rng(2)
    parts = [[rng.bytes(int(rng.integers(0, 3000))) for _ in range(100)] for _ in range(5)]
    called = []
    with ThreadPoolExecutor(4) as executor:
        digests = [OrderedDigest(executor, hashlib.sha256(), hashlib.md5()) for _ in parts]
        for number in range(100):
            for digest, own in zip(digests, parts, strict=True):
                digest.update(own[number], done=lambda: called.append(None))
        results = [digest.finish(lambda *both: both) for digest in digests]
        for result, own in zip(results, parts, strict=True):
            whole = b"".join(own)
            assert result.result() == (
                hashlib.sha256(whole).hexdigest(),
                hashlib.md5(whole).hexdigest(),
            )
        failed = digests[0].finish(lambda *both: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            failed.result()
    assert len(called) == 500


def test_threads_are_the_cores_up_to_the_useful_ones_unless_asked_for(monkeypatch):
    for cores, expected in ((1, 1), (2, 2), (16, 16), (64, 16)):
        monkeypatch.setattr(converter_options, "cores", lambda cores=cores: cores)
        assert ConvertOptions().threads == expected
        assert ConvertOptions(workers=16).threads == 16
