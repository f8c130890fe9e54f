"""The loader's memory: aligned, bounded, and never in use for two tensors at once."""

from __future__ import annotations

import gc
import math
import mmap
from collections import deque
from itertools import pairwise

import pytest
import torch

from codecllm.loader.host.memory import RecycledMemory, SlabMemory, empty_tensor, tensor_over

SHAPE = (1024, 4096)


def _tensor(memory, shape, dtype):
    return tensor_over(memory.empty_bytes(math.prod(shape) * dtype.itemsize), shape, dtype)


def test_tensors_are_aligned_and_writable():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int64):
        for tensor in (empty_tensor(SHAPE, dtype), _tensor(RecycledMemory(1 << 30), SHAPE, dtype)):
            assert tensor.shape == SHAPE
            assert tensor.dtype == dtype
            assert tensor.data_ptr() % 64 == 0
            tensor.fill_(3)
            assert tensor.sum(dtype=torch.float64) == 3 * tensor.numel()


def test_memory_of_a_dropped_tensor_is_used_again():
    memory = RecycledMemory(1 << 30)
    first = _tensor(memory, SHAPE, torch.float32)
    place = first.data_ptr()
    del first
    gc.collect()
    assert _tensor(memory, SHAPE, torch.float32).data_ptr() == place


def test_memory_in_use_is_never_given_out_again():
    memory = RecycledMemory(1 << 30)
    first = _tensor(memory, SHAPE, torch.float32).fill_(1)
    view = first[5:9].t()
    parameter = torch.nn.Parameter(first)
    del first
    gc.collect()
    others = [_tensor(memory, SHAPE, torch.float32).fill_(2) for _ in range(3)]
    assert (parameter == 1).all()
    del parameter
    gc.collect()
    others.append(_tensor(memory, SHAPE, torch.float32).fill_(3))
    assert (view == 1).all()
    assert len({tensor.data_ptr() for tensor in others}) == 4


def test_kept_memory_is_bounded_and_let_go():
    memory = RecycledMemory(40 << 20)
    tensors = [_tensor(memory, SHAPE, torch.float32) for _ in range(5)]
    del tensors
    gc.collect()
    assert sum(kept.nbytes for kept in memory._free) <= 40 << 20
    last = _tensor(memory, SHAPE, torch.float32)
    memory.close()
    del last
    gc.collect()
    assert not memory._free


def test_memory_of_another_size_is_kept_for_its_own():
    memory = RecycledMemory(1 << 30)
    first = _tensor(memory, SHAPE, torch.float32)
    place = first.data_ptr()
    del first
    gc.collect()
    other = _tensor(memory, (2048, 4096), torch.float32)
    assert other.numel() == 2048 * 4096
    assert _tensor(memory, SHAPE, torch.float32).data_ptr() == place


def test_memory_that_another_thread_takes_first_is_not_waited_for():
    class Emptied(deque):
        """As if it were emptied between a look at its length and the take."""

        def __len__(self):
            return 1

    memory = RecycledMemory(1 << 30)
    memory._free = Emptied()
    assert _tensor(memory, SHAPE, torch.float32).fill_(1).sum() == math.prod(SHAPE)


@pytest.mark.parametrize("lacks", ["huge pages", "mappings"])
def test_slabs_without_huge_pages_are_plain_memory(monkeypatch, lacks):
    def refuse(*_, **__):
        raise OSError("no mapping is left")

    if lacks == "mappings":
        monkeypatch.setattr(mmap, "mmap", refuse)
    else:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    memory = SlabMemory()
    tensors = [_tensor(memory, (300, 577), torch.bfloat16).fill_(number) for number in range(9)]
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_small_tensors_share_slabs_but_no_storage():
    memory = SlabMemory()
    tensors = [_tensor(memory, (300, 577), torch.bfloat16).fill_(number) for number in range(100)]
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert all(
        tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() % 64 == 0
        for tensor in tensors
    )
    places = sorted(tensor.data_ptr() for tensor in tensors)
    assert all(b - a >= tensors[0].nbytes for a, b in pairwise(places))
    kept = tensors.pop(50)
    del tensors
    gc.collect()
    again = [_tensor(memory, (300, 577), torch.bfloat16).fill_(7) for _ in range(100)]
    assert (kept == 50).all()
    assert all((tensor == 7).all() for tensor in again)


def test_tiny_and_empty_tensors_are_made_too():
    memory = SlabMemory()
    with torch.device("meta"):  # as where transformers builds the empty model
        shapes = [(0, 5), (3,), (), (200, 200), (2000, 2000)]
        assert [tuple(_tensor(memory, shape, torch.float32).shape) for shape in shapes] == shapes
        assert {_tensor(memory, shape, torch.float32).device.type for shape in shapes} == {"cpu"}
