"""Forms of weights by themselves: moved, split, in a stack, and copied into each other."""

from __future__ import annotations

import pytest
import torch

from codecllm.loader.resident.coded_weight import coded_parameter
from codecllm.loader.resident.escapes import split_codes
from codecllm.loader.resident.joined_form import stacked
from tests.loader.resident.cases import COLS, CPU, ROWS


@pytest.mark.parametrize("name", ["int8", "columns", "escapes"])
def test_codes_move_with_all_that_belongs_to_them(cases, name):
    form = cases[name].form
    assert form.moved(CPU) is form
    moved = form.moved(torch.device("meta"))
    assert type(moved) is type(form)
    assert (moved.name, moved.shape) == (form.name, form.shape)
    held = moved.held_tensors()
    assert {key: value.device.type for key, value in held.items()} == dict.fromkeys(held, "meta")
    assert {key: value.shape for key, value in held.items()} == {
        key: value.shape for key, value in form.held_tensors().items()
    }


def test_wide_codes_that_all_fit_a_byte_have_no_escapes():
    codes = torch.arange(-127, 128, dtype=torch.int16).view(15, 17)
    narrow, escapes = split_codes(codes)
    assert narrow.dtype == torch.int8
    assert torch.equal(narrow, codes)
    assert escapes is None


def test_a_copy_into_a_weight_of_another_dtype_is_rounded(case):
    target = case.weight(torch.bfloat16)
    with torch.no_grad():
        target.copy_(case.weight(torch.float32))
    assert target.dtype == torch.bfloat16
    assert torch.equal(target, case.values.to(torch.bfloat16))


def test_bytes_are_those_in_memory_and_of_an_alias_those_of_its_values(case):
    weight = case.weight()
    assert weight.nbytes == case.form.nbytes
    assert weight.detach().nbytes == ROWS * COLS * 4


def test_one_matrix_of_a_stack_has_memory_of_its_own(case):
    stack = coded_parameter(stacked([case.form, case.form]), torch.float32, CPU)
    member = stack.detach()[1]
    assert member.data_ptr() == member.data_ptr()
    read = torch.empty(0).set_(member.untyped_storage(), 0, (ROWS, COLS))
    assert read.data_ptr() == member.data_ptr()
    assert torch.equal(read, case.values)
    assert stack.form is not None
