"""The path of the trellis experiment is the cheapest one, and its codes fit its states."""

from __future__ import annotations

import shutil
from itertools import product

import numpy as np
import pytest

from benchmarks.quality.trellis_path import matrix_codes, path
from codecllm.converter.rate.feedback import factor_of

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# From each state: the next one by the last two bits of the integer.
NEXT = (
    {0: 0, 2: 1},
    {1: 2, 3: 3},
    {2: 4, 0: 5},
    {3: 6, 1: 7},
    {2: 0, 0: 1},
    {3: 2, 1: 3},
    {0: 4, 2: 5},
    {1: 6, 3: 7},
)


def _follows(codes, coset):
    state = 0
    for code, bit in zip(codes.tolist(), coset.tolist(), strict=True):
        assert bit == state & 1 == code & 1
        state = NEXT[state][code & 3]


def test_no_other_path_is_cheaper():
    values = np.array([0.4, -2.6, 1.5, 3.2, -0.9], np.float32)
    codes, coset, cost = path(values, 0.05)
    _follows(codes, coset)
    costs = []
    for others in product(range(-5, 6), repeat=len(values)):
        state = 0
        for code in others:
            state = NEXT[state].get(code & 3) if state is not None else None
        if state is not None:
            costs.append(
                sum((v - n) ** 2 + 0.05 * n * n for v, n in zip(values, others, strict=True))
            )
    assert cost == pytest.approx(min(costs), rel=1e-5)
    assert cost == pytest.approx(float(((values - codes) ** 2 + 0.05 * codes**2).sum()), rel=1e-5)


def test_feedback_lessens_the_error_of_outputs():
    random = np.random.default_rng(0)
    weights = random.standard_normal((300, 96)).astype(np.float32)
    inputs = random.standard_normal((400, 96)) @ random.standard_normal((96, 96))
    products = inputs.T @ inputs
    steps = np.full(300, 0.1, np.float32), np.geomspace(0.5, 2, 96).astype(np.float32)
    harm = []
    for factor in (None, factor_of(products, 0.01)):
        codes, coset = matrix_codes(weights, steps, factor)
        first = int(factor.order[0]) if factor else 0
        _follows(codes[:, first], coset[:, first])
        error = weights - codes * steps[0][:, None] * steps[1]
        harm.append(float(np.einsum("rc,cd,rd->", error, products, error, optimize=True)))
    assert harm[1] < 0.5 * harm[0]


def test_a_weight_far_outside_keeps_its_code():
    codes, _, cost = path(np.array([70001.2, -0.4], np.float32), 0.0)
    assert abs(int(codes[0]) - 70001.2) <= 3 and cost < 9
