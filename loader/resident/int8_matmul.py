"""Products with int8 weights: one function, and the kernels that it chooses between.

`exact` dequantizes blocks of rows to the dtype of the inputs and multiplies as a plain linear layer would: where it runs, the
results are those of dense loading. `packed` multiplies with the codes as they are: it reads half of bf16's bytes, which is what
a product with few rows of inputs costs on a CPU, and rounds twice (the sum, then its product with the scale). `fused` does the
same on a GPU by kernels of our own, and rounds once. Scales of columns go into the inputs first, which rounds these once more.
`python -m benchmarks.int8_matmul` compares them with a dense layer.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from codecllm.loader.device.codecs import why_no_kernels
from codecllm.loader.device.streams import is_accelerator

DEQUANTIZE_ELEMENTS = 1 << 20
"""Elements dequantized at once: the float32 intermediate is 4 MiB."""

SCRATCH_ELEMENTS = 1 << 26
"""Most elements of a weight that exist dequantized at once; a larger weight (a vocabulary) is multiplied in blocks of rows."""

PACKED_ROWS = 32
"""Most rows of inputs for `packed`."""

HAS_PACKED_KERNEL = hasattr(
    torch, "_weight_int8pack_mm"
) and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Whether torch has the kernel of `packed`, in a form that is fast on this CPU."""


def dequantize_rows(
    codes: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns cast(fl32(code * step)): the very bits that dense loading puts into memory.

    Args:
        codes: int8 [rows, cols].
        scale: float32 [rows].
        dtype: dtype of the result.
        col_scale: float32 [cols], or None: a step is fl32(scale * col_scale), or the scale of its row.

    Returns:
        `dtype` [rows, cols].
    """
    rows, cols = codes.shape
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    step = max(1, DEQUANTIZE_ELEMENTS // max(1, cols))
    for first in range(0, rows, step):
        block = slice(first, first + step)
        steps = scale[block, None] if col_scale is None else scale[block, None] * col_scale
        out[block] = codes[block].to(torch.float32).mul_(steps)
    return out


def int8_linear(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes `inputs @ dequantized(codes, scale).T + bias` in the dtype of `inputs`.

    Against `exact`, `packed` and `fused` differ by at most the rounding of the sum and of its product with the scale: 2^-8 of
    an output, besides what another order of summation does. With `col_scale` each input is rounded once more, which is 2^-8 of
    the sum of |input * weight| at most, and a tenth of that as a rule. Gradients flow to `inputs` and `bias`; the dequantized
    weight is made anew for them, not kept.

    Args:
        inputs: float [..., in].
        codes: int8 [out, in].
        scale: float32 [out].
        bias: [out] or None.
        col_scale: float32 [in] or None.

    Returns:
        [..., out], dtype of `inputs`.
    """
    if torch.is_grad_enabled() and (
        inputs.requires_grad or (bias is not None and bias.requires_grad)
    ):
        result: torch.Tensor = _FrozenInt8.apply(inputs, codes, scale, bias, col_scale)
        return result
    return _product(inputs, codes, scale, bias, col_scale)


def exact(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `int8_linear`: dequantizes, then multiplies as a linear layer of the dense model."""
    rows, cols = codes.shape
    step = max(1, SCRATCH_ELEMENTS // max(1, cols))
    if rows <= step:
        return functional.linear(
            inputs, dequantize_rows(codes, scale, inputs.dtype, col_scale), bias
        )
    step = max(64, step // 64 * 64)
    parts = []
    for first in range(0, rows, step):
        block = slice(first, first + step)
        weight = dequantize_rows(codes[block], scale[block], inputs.dtype, col_scale)
        parts.append(functional.linear(inputs, weight, None if bias is None else bias[block]))
    return torch.cat(parts, dim=-1)


def packed(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `int8_linear`: multiplies bfloat16 inputs on the CPU with the codes, then scales in float32."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    if col_scale is not None:
        flat = (flat * col_scale).to(inputs.dtype)
    sums = torch._weight_int8pack_mm(flat, codes, _ones(codes.shape[0]))
    if bias is None:
        scaled = sums.mul_(scale)  # the product is one of float32, rounded where it is stored
    else:
        scaled = torch.addcmul(bias.to(torch.float32), sums.to(torch.float32), scale).to(
            inputs.dtype
        )
    return scaled.view(*inputs.shape[:-1], codes.shape[0])


def fused(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `int8_linear`: multiplies bfloat16 or float16 inputs with the codes by our kernels for GPUs."""
    from codecllm.loader.kernels import int8_linear as kernels

    scaled = inputs if col_scale is None else (inputs * col_scale).to(inputs.dtype)
    return kernels.int8_linear(scaled, codes, scale, bias)


def can_fuse(inputs: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether `fused` can multiply these: inputs of 16 bits on a GPU for which Triton compiles."""
    return (
        is_accelerator(
            inputs.device
        )  # asked first: torch.compile, which comes here for a CPU, warns of the cached question
        and inputs.dtype in (torch.bfloat16, torch.float16)
        and codes.is_contiguous()
        and _has_kernels(inputs.device)
    )


def can_pack(inputs: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether `packed` can and should multiply these: few rows of bfloat16 on a CPU that has a fast kernel."""
    return (
        inputs.dtype == torch.bfloat16
        and inputs.device.type == "cpu"
        and 0 < inputs.numel() <= PACKED_ROWS * inputs.shape[-1]
        and codes.shape[0] % 16 == 0
        and codes.shape[1] % 32
        == 0  # where columns are no multiple of 16 the kernel reads past the end of the codes
        and codes.is_contiguous()
        and HAS_PACKED_KERNEL
    )


def _product(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None,
) -> torch.Tensor:
    if torch.compiler.is_compiling() and is_accelerator(inputs.device):
        if inputs.dtype == torch.float32 and torch.is_autocast_enabled(
            inputs.device.type
        ):  # inside there is no autocast
            inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
        whole: torch.Tensor = _opaque_product(inputs, codes, scale, bias, col_scale)
        return whole
    kernel = fused if can_fuse(inputs, codes) else packed if can_pack(inputs, codes) else exact
    return kernel(inputs, codes, scale, bias, col_scale)


_opaque_product = torch.library.custom_op(
    "codecllm::int8_linear",
    _product,
    mutates_args=(),
    schema="(Tensor inputs, Tensor codes, Tensor scale, Tensor? bias, Tensor? col_scale) -> Tensor",
)
"""`_product` as one operation into which torch.compile does not look: it could not follow how a kernel is chosen."""

_opaque_product.register_fake(
    lambda inputs, codes, *_: inputs.new_empty(*inputs.shape[:-1], codes.shape[0])
)


def _ones(channels: int) -> torch.Tensor:
    """Returns scales for the kernel of `packed`: it takes them in bfloat16 only, and ours would move whole channels."""
    return (
        torch.ones(channels, dtype=torch.bfloat16)
        if torch.compiler.is_compiling()
        else _kept_ones(channels)
    )


@lru_cache(maxsize=64)
def _kept_ones(channels: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.ones(channels, dtype=torch.bfloat16)


@cache
def _has_kernels(device: torch.device) -> bool:
    return why_no_kernels(device) is None


class _FrozenInt8(torch.autograd.Function):
    """The product, with gradients for all but the weight, which has none."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        col_scale: torch.Tensor | None,
    ) -> Any:
        ctx.save_for_backward(codes, scale, col_scale)
        return _product(inputs, codes, scale, bias, col_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scale, col_scale = ctx.saved_tensors
        rows, cols = codes.shape
        to_inputs = None
        if ctx.needs_input_grad[0]:
            step = max(1, SCRATCH_ELEMENTS // max(1, cols))
            for first in range(0, rows, step):
                block = slice(first, first + step)
                part = grad[..., block] @ dequantize_rows(
                    codes[block], scale[block], grad.dtype, col_scale
                )
                to_inputs = part if to_inputs is None else to_inputs.add_(part)
        to_bias = grad.reshape(-1, rows).sum(0) if ctx.needs_input_grad[3] else None
        return to_inputs, None, None, to_bias, None
