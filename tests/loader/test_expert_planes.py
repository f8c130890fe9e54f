"""Codes of experts in planes of bits: the layout, and products with it.

Without a GPU the kernel runs under Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from codecllm.loader.experts import planes
from codecllm.loader.experts.planes import ENTRY_BITS, choose_bits, codes_of_expert, pack_experts
from codecllm.loader.kernels import int8_experts
from codecllm.loader.kernels.expert_codes import ExpertPlanes, unit_of, widths_of
from codecllm.loader.kernels.expert_planes import unpack

pytestmark = pytest.mark.gpu_too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPERTS = 3


def _codes(experts, rows, cols, bits, *, seed=0, most=30_000):
    """Codes of which nearly all fit into `bits`; some are beyond, up to `most`."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (experts, rows, cols), generator=generator)
    large = torch.randint(-most, most + 1, codes.shape, generator=generator)
    near = torch.randint(-128, 128, codes.shape, generator=generator)
    kind = torch.rand(codes.shape, generator=generator)
    codes = torch.where(kind < 0.03, near, codes)
    return torch.where(kind < 0.01, large, codes).to(torch.int16).to(DEVICE)


def _packed(codes, bits, *, parts=0, seed=0):
    experts, rows, cols = codes.shape
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(experts, rows, generator=generator) + 0.5).to(DEVICE) * 1e-3
    columns = None
    if parts:
        columns = (torch.rand(experts, parts, cols, generator=generator) + 0.5).to(DEVICE)
    return pack_experts(lambda number: codes[number], scale, columns, cols, bits)


def _field(matrix, expert, row, column):
    """The field of one weight, bit by bit as the docstring of `ExpertPlanes` says."""
    value, low = 0, 0
    unit = unit_of(matrix.cols)
    for width, plane in zip(widths_of(matrix.bits), matrix.planes, strict=True):
        size = unit * width // 8
        inside = column % unit
        byte = int(plane[expert, row, column // unit * size + inside % size])
        value |= (byte >> (width * (inside // size)) & (1 << width) - 1) << low
        low += width
    return value - (1 << (matrix.bits - 1))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "cols", "parts"), [(70, 96, 2), (33, 256, 0), (64, 384, 1)])
def test_packed_codes_are_the_codes(bits, rows, cols, parts):
    codes = _codes(EXPERTS, rows, cols, bits)
    matrix = _packed(codes, bits, parts=parts)
    assert matrix.cols == cols
    assert matrix.wide is not None
    assert (matrix.near is None) == (bits == 8)
    for expert in range(EXPERTS):
        assert torch.equal(codes_of_expert(matrix, expert), codes[expert])
    half = 1 << (bits - 1)
    for row, column in ((0, 0), (rows - 1, cols - 1), (5, 17), (rows // 2, cols // 2 + 1)):
        code = int(codes[1, row, column])
        expected = code if -half <= code < half else 0
        assert _field(matrix, 1, row, column) == expected
    numbers = torch.tensor([2, -1, 0, 2], device=DEVICE)
    codes_of_8 = unpack(matrix, numbers).codes
    narrow = torch.where(codes.abs() < 128, codes, torch.where(codes == -128, codes, 0))
    for slot, number in enumerate(numbers.tolist()):
        if number >= 0:
            assert torch.equal(codes_of_8[slot].to(torch.int16), narrow[number])


def test_exceptions_lie_by_tiles_and_fit_16_bit_floats():
    codes = torch.zeros(2, 70, 32, dtype=torch.int16, device=DEVICE)
    codes[1, 69, 31], codes[1, 40, 0], codes[0, 3, 4], codes[1, 0, 2] = -32768, 301, 9, -128
    matrix = _packed(codes, 4)
    assert matrix.near.bounds.tolist() == [[[0, 1, 1, 1]], [[1, 2, 2, 2]]]
    assert _places(matrix.near) == [(3, 4), (0, 2)]
    assert matrix.near.values.tolist() == [9, -128]
    assert matrix.wide.bounds.tolist() == [[[0, 0, 0, 0]], [[0, 0, 2, 3]]]
    assert _places(matrix.wide) == [(40, 0), (40, 0), (69, 31)]
    values = matrix.wide.values
    assert values.tolist() == [256, 45, -32768]
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(values.to(dtype).to(torch.int32), values.to(torch.int32))


def _places(entries):
    return [(place >> 16, place & 0xFFFF) for place in entries.places.tolist()]


def test_the_bits_take_the_fewest_bytes():
    codes = torch.zeros(2, 64, 64, dtype=torch.int16)
    codes[:, :, ::2] = 3

    def chosen():
        return choose_bits(lambda number: codes[number], torch.ones(2, 64), 64)

    assert chosen() == 3
    # One bit more for all codes, or an exception for each that needs it.
    few = codes.numel() // ENTRY_BITS
    codes.view(-1)[: few - 1] = 5
    assert chosen() == 3
    codes.view(-1)[: few + 1] = 5
    assert chosen() == 4
    codes[:] = 1000
    assert chosen() == 2


def test_experts_are_packed_alike_one_or_several_at_a_time(monkeypatch):
    codes = _codes(5, 40, 64, 3)
    several = _packed(codes, 3, parts=2)
    monkeypatch.setattr(planes, "BLOCK_ELEMENTS", 2 * 40 * 64)
    two = _packed(codes, 3, parts=2)
    for one, other in zip(several.planes, two.planes, strict=True):
        assert torch.equal(one, other)
    for one, other in ((several.near, two.near), (several.wide, two.wide)):
        for name in ("bounds", "places", "values"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("tokens", "parts"), [(1, 1), (3, 0), (40, 1)])
def test_products_are_those_of_the_codes(bits, tokens, parts, monkeypatch):
    monkeypatch.setattr(int8_experts, "SCRATCH_BYTES", 2 * 96 * 96)  # two experts at a time
    hidden, inner, chosen = 96, 64, 2
    generator = torch.Generator().manual_seed(bits)
    wide = [
        _codes(EXPERTS, 2 * inner, hidden, bits, most=700, seed=1),
        _codes(EXPERTS, hidden, inner, bits, most=700, seed=2),
    ]
    matrices = [_packed(wide[0], bits, parts=2 * parts), _packed(wide[1], bits, parts=parts)]
    inputs = (torch.rand(tokens, hidden, generator=generator) - 0.5).to(torch.float16).to(DEVICE)
    shares = torch.rand(tokens, chosen, generator=generator).to(DEVICE)
    numbers = torch.randint(-1, EXPERTS, (tokens, chosen), generator=generator).to(DEVICE)

    def gate(both):
        one, other = both.chunk(2, dim=-1)
        return one * torch.sigmoid(other)

    got = int8_experts.experts_mlp(inputs, numbers, shares, *matrices, gate)
    expected = torch.zeros(tokens, hidden, device=DEVICE)
    for token in range(tokens):
        for number, share in zip(numbers[token].tolist(), shares[token], strict=True):
            if number >= 0:
                both = _weights(matrices[0], wide[0], number) @ inputs[token].float()
                expected[token] += share * (_weights(matrices[1], wide[1], number) @ gate(both))
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max())


def _weights(matrix: ExpertPlanes, codes, number):
    weights = codes[number].float() * matrix.scale[number][:, None]
    if matrix.col_scale is not None:
        parts = matrix.col_scale.shape[1]
        weights = weights * matrix.col_scale[number].repeat_interleave(len(weights) // parts, 0)
    return weights
