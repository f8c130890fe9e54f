"""Products with int8 weights stay within the stated error of the exact product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from codecllm.loader.resident import int8_matmul
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.scaled_codes import ScaledCodes

pytestmark = pytest.mark.gpu_too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1), (16, 32), (48, 96), (17, 33), (256, 160), (96, 64)]


def _operands(rows, cols, tokens, dtype):
    generator = torch.Generator().manual_seed(rows * cols + tokens)
    codes = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, generator=generator)
    scale = torch.rand(rows, generator=generator) * 0.01 + 1e-4
    return (
        torch.randn(tokens, cols, generator=generator).to(dtype),
        codes,
        scale,
        torch.randn(rows, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_exact_is_a_linear_layer_of_the_dequantized_weight(monkeypatch, rows, cols, dtype):
    monkeypatch.setattr(int8_matmul, "DEQUANTIZE_ELEMENTS", 64)
    inputs, codes, scale, bias = _operands(rows, cols, 5, dtype)
    weight = (codes.to(torch.float32) * scale[:, None]).to(dtype)
    assert torch.equal(int8_matmul.dequantize_rows(codes, scale, dtype), weight)
    for b in (None, bias):
        assert torch.equal(
            int8_matmul.exact(inputs, codes, scale, b), functional.linear(inputs, weight, b)
        )


def test_a_large_weight_is_multiplied_in_blocks(monkeypatch):
    inputs, codes, scale, bias = _operands(256, 160, 3, torch.float32)
    whole = int8_matmul.exact(inputs, codes, scale, bias)
    monkeypatch.setattr(int8_matmul, "SCRATCH_ELEMENTS", 64 * 160)
    torch.testing.assert_close(int8_matmul.exact(inputs, codes, scale, bias), whole)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 32])
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (48, 96), (256, 160)])
def test_packed_is_within_two_roundings_of_the_exact_product(rows, cols, tokens, biased):
    inputs, codes, scale, bias = _operands(rows, cols, tokens, torch.bfloat16)
    if not int8_matmul.can_pack(inputs, codes):
        pytest.skip("this CPU or torch has no packed kernel")
    got = int8_matmul.int8_product(inputs, codes, scale, bias if biased else None)
    products = inputs.double() @ codes.double().T * scale.double()
    expected = products + bias.double() if biased else products
    assert (
        (got.double() - expected).abs() <= 2**-8 * (products.abs() + expected.abs()) + 1e-6
    ).all()


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(16, 64, 1), (33, 48, 3), (20, 17, 2)])
def test_fused_is_within_its_roundings_of_the_exact_product(rows, cols, tokens, by_column):
    """On a GPU where there is one, else under Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    inputs, codes, scale, bias = (
        tensor.to(DEVICE) for tensor in _operands(rows, cols, tokens, torch.bfloat16)
    )
    columns = torch.linspace(0.5, 2, cols, device=DEVICE) if by_column else None
    got = int8_matmul.fused(inputs, codes, scale, bias, columns)
    step = scale[:, None] if columns is None else scale[:, None] * columns
    products = inputs.double() @ (codes * step.double()).T
    magnitudes = inputs.double().abs() @ (codes * step.double()).abs().T
    expected = products + bias.double()
    bound = 2**-8 * (products.abs() + expected.abs() + magnitudes) + 1e-6
    assert ((got.double() - expected).abs() <= bound).all()


def test_the_cpu_is_never_given_the_kernels_of_a_gpu():
    inputs, codes, _, _ = _operands(16, 64, 1, torch.bfloat16)
    assert not int8_matmul.can_fuse(inputs, codes)


@pytest.mark.parametrize(
    ("rows", "cols", "tokens", "dtype"),
    [
        (17, 64, 1, torch.bfloat16),
        (16, 40, 1, torch.bfloat16),
        (16, 32, 33, torch.bfloat16),
        (16, 32, 1, torch.float32),
        (16, 32, 1, torch.float16),
        (16, 32, 0, torch.bfloat16),
    ],
)
def test_packed_is_kept_from_what_it_cannot_do(rows, cols, tokens, dtype):
    inputs, codes, scale, bias = _operands(rows, cols, tokens, dtype)
    assert not int8_matmul.can_pack(inputs, codes)
    assert int8_matmul.int8_product(inputs, codes, scale, bias).shape == (tokens, rows)


def test_inputs_of_any_rank():
    inputs, codes, scale, bias = _operands(48, 96, 6, torch.bfloat16)
    flat = int8_matmul.int8_product(inputs, codes, scale, bias)
    assert torch.equal(
        int8_matmul.int8_product(inputs.view(2, 3, 96), codes, scale, bias), flat.view(2, 3, 48)
    )
    assert torch.equal(
        int8_matmul.int8_product(inputs[0], codes, scale, bias).view(1, -1), flat[:1]
    )


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "permuted": lambda t: t.view(1, 2, 3, 96).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "channels last": lambda t: t.view(2, 3, 96).transpose(0, 1).contiguous().transpose(0, 1),
    "every second column": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "part of the columns": lambda t: torch.cat([t, t], 1)[:, 96:],
    "every second row": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "expanded rows": lambda t: t[:1].expand(2, 5, 96),
    "expanded columns": lambda t: t[:, :1].expand(-1, 96),
    "one transposed row": lambda t: t.t().contiguous()[:, :1].t(),
    "vector with strides": lambda t: t.t().contiguous()[:, 1],
    "no rows": lambda t: t[:0],
    "no batch": lambda t: t.new_empty(0, 3, 96),
    "no tokens of many": lambda t: t.new_empty(3, 96, 0).transpose(1, 2),
}


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides(layout, dtype, by_column):
    inputs, codes, scale, bias = _operands(48, 96, 6, dtype)
    columns = torch.linspace(0.5, 2, 96) if by_column else None
    strided = LAYOUTS[layout](inputs)
    got = int8_matmul.int8_product(strided, codes, scale, bias, columns)
    plain = int8_matmul.int8_product(strided.clone().contiguous(), codes, scale, bias, columns)
    # torch may take another float32 kernel for other strides, which sums in another order.
    bound = 0.0 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got, plain, rtol=bound, atol=bound)
    weight = int8_matmul.dequantize_rows(codes, scale, torch.float64, columns)
    dense = functional.linear(strided.double(), weight, bias.double())
    bound = 0.02 * functional.linear(strided.double().abs(), weight.abs()) + 0.02
    assert got.shape == dense.shape and ((got.double() - dense).abs() <= bound).all()


@pytest.mark.parametrize("blocks", [1 << 26, 16 * 96])
def test_gradients_are_those_of_a_linear_layer(monkeypatch, blocks):
    monkeypatch.setattr(int8_matmul, "SCRATCH_ELEMENTS", blocks)
    inputs, codes, scale, bias = _operands(48, 96, 4, torch.float64)
    inputs, bias = inputs.requires_grad_(), bias.requires_grad_()
    weight = int8_matmul.dequantize_rows(codes, scale, torch.float64)
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(2, 2, 48, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(
        functional.linear(inputs.view(2, 2, 96), weight, bias), (inputs, bias), upstream
    )
    form = Int8Form("w", ScaledCodes(codes, scale))
    got = torch.autograd.grad(form.linear(inputs.view(2, 2, 96), bias), (inputs, bias), upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
