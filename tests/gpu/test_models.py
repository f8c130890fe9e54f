"""Whole models on a real device, in each form of residency, against the CPU."""

from __future__ import annotations

import pytest

from codecllm.loader import from_pretrained
from tests.integration import tiny_models
from tests.integration.outputs import same_bits

NAMES = sorted(tiny_models.FEW)


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": 0}, "auto"], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_dense_has_the_bits_of_the_cpu(container, scheme, device_map):
    expected = from_pretrained(container("llama", scheme)).state_dict()
    ours = from_pretrained(container("llama", scheme), device_map=device_map).state_dict()
    assert theirs_are_ours(expected, ours)
    assert all(value.is_cuda for value in ours.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decoder", ["auto", "cpu"])
def test_other_architectures(container, name, decoder):
    folder = container(name, "int8")
    ours = from_pretrained(folder, device_map="cuda", decoder=decoder).state_dict()
    assert theirs_are_ours(from_pretrained(folder).state_dict(), ours)


def theirs_are_ours(expected, ours):
    return expected.keys() == ours.keys() and all(same_bits(expected[key], ours[key].cpu()) for key in expected)
