"""Gradients through copies of a coded weight that were written to are those of plain tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from codecllm.loader.packed.form import PackedForm
from codecllm.loader.packed.matrix import pack_codes
from codecllm.loader.resident.coded_weight import CodedWeight, coded_parameter
from tests.loader.resident.cases import COLS, CPU, ROWS

INPUTS = torch.linspace(-1, 1, 3 * COLS).view(3, COLS)


def _iadd(weight, delta):
    weight += delta
    return weight


def _set_rows(weight, delta):
    weight[:100] = delta[:100]
    return weight


def _through_a_view(weight, delta):
    weight.view(-1).add_(delta.view(-1))
    return weight


def _through_an_old_view(weight, delta):
    view = weight.view(-1)
    weight.mul_(2)  # dense from here on
    view.add_(delta.view(-1))
    return weight


def _view_of_a_write(weight, delta):
    view = weight[2:]
    weight.add_(delta)
    return view


def _twice(weight, delta):
    weight.mul_(1 + delta)
    weight.sub_(delta * delta)
    return weight


def _read_between(weight, delta):
    weight.add_(delta)
    assert weight.sum().requires_grad
    return weight.mul_(2)


WRITES = {
    "iadd": _iadd,
    "add_": lambda weight, delta: weight.add_(delta),
    "mul_": lambda weight, delta: weight.mul_(1 + delta),
    "setitem": _set_rows,
    "view": _through_a_view,
    "old view": _through_an_old_view,
    "view of a write": _view_of_a_write,
    "transposed": lambda weight, delta: weight.T.add_(delta.T).T,
    "index_copy_": lambda weight, delta: weight.index_copy_(0, torch.arange(ROWS), delta),
    "index_add_": lambda weight, delta: weight.index_add_(0, torch.arange(ROWS), delta),
    "copy_": lambda weight, delta: weight.copy_(delta),
    "lerp_": lambda weight, delta: weight.lerp_(delta, 0.5),
    "masked": lambda weight, delta: weight.masked_scatter_(delta.detach() > 0, delta),
    "where": lambda weight, delta: weight.clamp_(max=delta),
    "twice": _twice,
    "read between": _read_between,
}
COPIES = {
    "clone": lambda weight: weight.detach().clone(),
    "deepcopy": lambda weight: copy.deepcopy(weight.data),
    "alias": lambda weight: weight.detach(),
    "parameter": lambda weight: weight,
}


def _gradient(weight, write):
    delta = torch.linspace(-0.1, 0.1, ROWS * COLS).view(ROWS, COLS).requires_grad_()
    outputs = functional.linear(INPUTS, write(weight, delta))
    outputs.pow(2).sum().backward()
    return outputs.detach(), delta.grad


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("copied", COPIES)
def test_writes_pass_gradients_on(case, copied, name):
    make, write = COPIES[copied], WRITES[name]
    outputs, grad = _gradient(make(case.weight()), write)
    plain_outputs, plain_grad = _gradient(make(case.plain()), write)
    assert plain_grad is not None and grad is not None
    assert torch.equal(outputs, plain_outputs)
    assert torch.equal(grad, plain_grad)


def test_writes_to_packed_weights_pass_gradients_on():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, (ROWS, COLS), dtype=torch.int8, generator=generator)
    matrix = pack_codes(codes, torch.full((ROWS,), 0.01), None)
    assert matrix is not None
    for write in WRITES.values():
        weight = coded_parameter(PackedForm("w", matrix), torch.float32, CPU)
        plain = weight.detach().clone() * 1
        assert isinstance(weight, CodedWeight) and not isinstance(plain, CodedWeight)
        _, grad = _gradient(weight.detach().clone(), write)
        _, plain_grad = _gradient(plain, write)
        assert grad is not None and torch.equal(grad, plain_grad)


def _leaf(weight):
    leaf = weight.detach().clone().requires_grad_()
    return leaf, leaf


def _leaf_of_a_view(weight):
    leaf = weight.detach().clone()[2:].requires_grad_()
    return leaf, leaf


def _seen_by_a_view(weight):
    whole = weight.detach().clone()
    part = whole[2:]
    whole.requires_grad_()
    part = whole[2:]
    return whole, part


@pytest.mark.parametrize("make", [_leaf, _leaf_of_a_view, _seen_by_a_view])
def test_leaves_get_their_gradients(case, make):
    grads = []
    for weight in (case.weight(), case.plain()):
        leaf, used = make(weight)
        for _ in range(2):
            functional.linear(INPUTS, used).pow(2).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
        assert leaf.requires_grad and leaf.is_leaf
    assert torch.equal(*grads)


def test_hooks_of_a_written_copy_are_called(case):
    seen = []
    weight = case.weight().detach().clone()
    weight.requires_grad_()
    weight.register_hook(lambda grad: seen.append(grad.shape))
    functional.linear(INPUTS, weight).sum().backward()
    assert seen == [weight.shape] and weight.grad is not None


def test_a_held_parameter_keeps_its_gradient(case):
    weight = case.weight()
    held = weight.view(-1)  # keeps the object from being exchanged
    weight.requires_grad_()
    functional.linear(INPUTS, weight).sum().backward()
    del held
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert weight.grad is not None, "a second look"


@pytest.mark.parametrize("dense", [False, True])
def test_data_with_a_graph_is_given_to_a_weight(case, dense):
    delta = torch.linspace(-0.1, 0.1, ROWS * COLS).view(ROWS, COLS).requires_grad_()
    results = []
    for weight in (case.weight(), case.plain()):
        if dense:
            with torch.no_grad():
                weight.mul_(2)
        weight.data += delta
        assert not weight.requires_grad
        results.append(weight.detach() * 1)
    assert torch.equal(*results)


def test_a_deep_copy_of_a_leaf_is_trained_too(case):
    for make in (lambda weight: weight, lambda weight: weight.detach().clone()):
        weight = make(case.weight()).requires_grad_()
        assert copy.deepcopy(weight).requires_grad
        assert not copy.deepcopy(make(case.weight())).requires_grad


def test_a_tensor_with_a_graph_is_not_deeply_copied(case):
    weight = case.weight().detach().clone()
    weight.add_(torch.zeros(ROWS, COLS, requires_grad=True))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(weight)
