from __future__ import annotations

import gc

import torch

from codecllm.loader.memory import RecycledMemory, empty_tensor

SHAPE = (1024, 4096)


def test_tensors_are_aligned_and_writable():
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        for tensor in (empty_tensor(SHAPE, dtype), RecycledMemory(1 << 30).empty_tensor(SHAPE, dtype)):
            assert tensor.shape == SHAPE
            assert tensor.dtype == dtype
            assert tensor.data_ptr() % 64 == 0
            tensor.fill_(3)
            assert tensor.sum(dtype=torch.float64) == 3 * tensor.numel()


def test_memory_of_a_dropped_tensor_is_used_again():
    memory = RecycledMemory(1 << 30)
    first = memory.empty_tensor(SHAPE, torch.float32)
    place = first.data_ptr()
    del first
    gc.collect()
    assert memory.empty_tensor(SHAPE, torch.float32).data_ptr() == place


def test_memory_in_use_is_never_given_out_again():
    memory = RecycledMemory(1 << 30)
    first = memory.empty_tensor(SHAPE, torch.float32).fill_(1)
    view = first[5:9].t()
    parameter = torch.nn.Parameter(first)
    del first
    gc.collect()
    others = [memory.empty_tensor(SHAPE, torch.float32).fill_(2) for _ in range(3)]
    assert (parameter == 1).all()
    del parameter
    gc.collect()
    others.append(memory.empty_tensor(SHAPE, torch.float32).fill_(3))
    assert (view == 1).all()
    assert len({tensor.data_ptr() for tensor in others}) == 4


def test_kept_memory_is_bounded_and_let_go():
    memory = RecycledMemory(40 << 20)
    tensors = [memory.empty_tensor(SHAPE, torch.float32) for _ in range(5)]
    del tensors
    gc.collect()
    assert sum(kept.nbytes for kept in memory._free) <= 40 << 20
    last = memory.empty_tensor(SHAPE, torch.float32)
    memory.close()
    del last
    gc.collect()
    assert not memory._free
