"""Products with experts' int8 weights: each choice's is that of its expert alone.

Without a GPU the kernel runs under Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from codecllm.loader.kernels.expert_codes import ExpertCodes
from codecllm.loader.kernels.int8_experts import (
    FEW,
    block_size,
    experts_linear,
    experts_mlp,
    make_blocks,
)

pytestmark = pytest.mark.gpu_too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPERTS = 5


def _drawn(*shape, seed=0, low=0.0):
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + low
    return values.to(DEVICE)


@pytest.mark.parametrize(
    ("tokens", "chosen", "rows", "cols"),
    [(1, 2, 40, 256), (7, 2, 32, 48), (33, 3, 70, 272), (200, 2, 33, 64)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_columns", [False, True])
def test_each_choice_is_multiplied_by_its_expert(tokens, chosen, rows, cols, dtype, has_columns):
    wide = torch.randint(-127, 128, (EXPERTS, 2 * rows, cols), dtype=torch.int8, device=DEVICE)
    codes = wide[:, rows:]  # experts need not lie one behind the other
    scale = _drawn(EXPERTS, 2 * rows, low=0.1)[:, rows:]
    columns = _drawn(EXPERTS, 2, cols, low=0.5)[:, 1] if has_columns else None
    inputs = (_drawn(tokens, cols, seed=1) - 0.5).to(dtype)
    # Expert 3 is chosen by nobody; -1 is on another rank.
    places = torch.tensor([-1, 0, 1, 2, 4], device=DEVICE)
    numbers = places[(_drawn(tokens, chosen, seed=2) * 5).long()].reshape(-1)
    out = torch.full((len(numbers), rows + 8), 7.0, dtype=dtype, device=DEVICE)
    blocks = make_blocks(numbers, EXPERTS)
    matrix = ExpertCodes(codes, scale, None if columns is None else columns[:, None])
    experts_linear(inputs, matrix, blocks, out[:, :rows])
    assert (out[:, rows:] == 7).all()
    assert (out[numbers < 0] == 7).all()
    weights = codes.double() * scale.double()[..., None]
    for choice, number in enumerate(numbers.tolist()):
        if number < 0:
            continue
        values = inputs[choice // chosen]
        if columns is not None:
            values = (values.float() * columns[number]).to(dtype)
        exact = weights[number] @ values.double()
        slack = weights[number].abs() @ values.double().abs()
        error = (out[choice, :rows].double() - exact).abs()
        # The interpreter truncates bfloat16: the result, and inputs that columns scale.
        rounding = 2.0 ** (-7 if DEVICE.type == "cpu" else -8)
        inputs_too = rounding if has_columns and DEVICE.type == "cpu" else 2**-16
        assert (error <= rounding * exact.abs() + inputs_too * slack).all()


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("has_columns", [False, True])
def test_the_sum_of_experts_is_that_of_their_products(tokens, has_columns):
    hidden, inner, chosen = 96, 48, 2

    def made(parts, rows, cols, seed):
        shape = (EXPERTS, parts * rows, cols)
        codes = ((_drawn(*shape, seed=seed) - 0.5) * 250).round().to(torch.int8)
        columns = _drawn(EXPERTS, parts, cols, seed=seed, low=0.5) if has_columns else None
        return ExpertCodes(codes, _drawn(EXPERTS, parts * rows, seed=seed) * 1e-3, columns)

    gate_up, down = made(2, inner, hidden, 1), made(1, hidden, inner, 2)
    inputs = (_drawn(tokens, hidden, seed=3) * 2 - 1).to(torch.float16)
    shares = _drawn(tokens, chosen, seed=4)
    numbers = (_drawn(tokens, chosen, seed=5) * 6).long() - 1
    got = experts_mlp(inputs, numbers, shares, gate_up, down, _activate)
    expected = torch.zeros(tokens, hidden, device=DEVICE)
    for token in range(tokens):
        for number, share in zip(numbers[token].tolist(), shares[token], strict=True):
            if number >= 0:
                both = _product(inputs[token], gate_up, number)
                expected[token] += share * _product(_activate(both), down, number)
    torch.testing.assert_close(got, expected.to(torch.float16), rtol=2e-2, atol=2e-4)


def _activate(both):
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _product(inputs, matrix, number):
    weights = matrix.codes[number].float() * matrix.scale[number][:, None]
    if matrix.col_scale is not None:
        parts = matrix.col_scale.shape[1]
        weights *= matrix.col_scale[number].repeat_interleave(len(weights) // parts, 0)
    return weights @ inputs.float()


@pytest.mark.parametrize("choices", [1, FEW, FEW + 1, 300, 4000])
def test_blocks_hold_every_choice_once(choices):
    numbers = (_drawn(choices) * (EXPERTS + 1)).long() - 1
    blocks = make_blocks(numbers, EXPERTS)
    size = block_size(choices, EXPERTS) if choices > FEW else 1
    held = []
    for expert, start, stop in zip(blocks.expert, blocks.start, blocks.stop, strict=True):
        if expert >= 0:
            assert 0 < stop - start <= size
            mine = blocks.order[start:stop]
            assert (numbers[mine] == expert).all()
            held += mine.tolist()
    assert sorted(held) == (numbers >= 0).nonzero().flatten().tolist()
