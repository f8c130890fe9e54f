"""Parameters that a load left without weights are found, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from codecllm.formats.errors import ModelMismatchError
from codecllm.serving.unfilled import COUNTED, mark_unfilled, refuse_unfilled


class _Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.fused = nn.Parameter(torch.zeros(6, 4, dtype=dtype), requires_grad=False)
        self.experts = nn.Parameter(torch.zeros(2, 3, 4, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.full((5,), 3, dtype=dtype), requires_grad=False)
        self.counter = nn.Parameter(torch.arange(3), requires_grad=False)
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=dtype), requires_grad=False)

    def fill(self, *names):
        for name in names:
            getattr(self, name).data.fill_(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_full_model_passes_and_keeps_its_weights(dtype):
    model = _Model(dtype)
    marks = mark_unfilled(model)
    assert set(marks) == {"fused", "experts", "bias"}
    model.fill("fused", "experts", "bias")
    assert refuse_unfilled(model, marks) == []
    assert all((value == 1).all() for name, value in model.named_parameters() if name in marks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_that_never_came_are_counted(dtype):
    model = _Model(dtype)
    marks = mark_unfilled(model)
    model.fill("experts", "bias")
    model.fused.data[:4] = 1
    with pytest.raises(ModelMismatchError, match=r"'fused'.*got 4 rows, expected 6"):
        refuse_unfilled(model, marks)


def test_an_expert_that_never_came():
    model = _Model()
    marks = mark_unfilled(model)
    model.fill("fused", "bias")
    model.experts.data[0] = 1
    with pytest.raises(ModelMismatchError, match=r"'experts'.*got 3 rows, expected 6"):
        refuse_unfilled(model, marks)


def test_a_parameter_with_a_default_gets_it_back():
    model = _Model()
    marks = mark_unfilled(model)
    model.fill("fused", "experts")
    assert refuse_unfilled(model, marks) == ["bias"]
    assert (model.bias == 3).all()


def test_a_parameter_that_was_replaced_is_the_engines_own():
    model = _Model()
    marks = mark_unfilled(model)
    model.fill("experts", "bias")
    model.fused.data[:4] = 1
    model.fused = nn.Parameter(model.fused.data.clone(), requires_grad=False)
    refuse_unfilled(model, marks)


def test_a_layer_that_counts_its_parts_is_left_alone():
    model = _Model()
    setattr(model.fused, COUNTED, True)
    assert set(mark_unfilled(model)) == {"experts", "bias"}
    assert (model.fused == 0).all()
