"""Products with int8 weights: one function, and the kernels that it chooses between.

`exact` dequantizes blocks of rows to the dtype of the inputs and multiplies as a plain linear layer
would: where it runs, the results are those of dense loading. `packed` multiplies with the codes as
they are: it reads half of bf16's bytes, the cost of a product with few rows of inputs on a CPU, and
rounds twice (the sum, then its product with the scale). `fused` does the same on a GPU by kernels
of our own, and rounds once. Scales of columns go into the inputs first, which rounds these once
more. `python -m benchmarks.int8_matmul` compares them with a dense layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch.nn import functional

from codecllm.loader.device.codecs import why_no_kernels
from codecllm.loader.device.streams import is_accelerator
from codecllm.loader.resident.form import is_traced

DEQUANTIZE_ELEMENTS = 1 << 20
"""Elements dequantized at once: the float32 intermediate is 4 MiB."""

SCRATCH_ELEMENTS = 1 << 26
"""Most elements of a weight that exist dequantized at once.

A larger weight (a vocabulary) is multiplied in blocks of rows.
"""

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
        col_scale: float32 [cols], or None: a step is fl32(scale * col_scale), or the scale of its
            row.

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


def exact(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `int8_product`: dequantizes, then multiplies as a linear layer of the dense model."""

    def weights(block: slice) -> torch.Tensor:
        return dequantize_rows(codes[block], scale[block], inputs.dtype, col_scale)

    return product_by_blocks(inputs, bias, codes.shape, weights)


def product_by_blocks(
    inputs: torch.Tensor,
    bias: torch.Tensor | None,
    shape: torch.Size,
    weights: Callable[[slice], torch.Tensor],
) -> torch.Tensor:
    """Returns `inputs @ all weights.T + bias`, [..., rows], with a part of the weights at a time.

    Args:
        inputs: float [..., cols].
        bias: [rows] or None.
        shape: rows and columns of all weights.
        weights: rows of a block -> their weights, of the dtype of `inputs`.
    """
    rows, cols = shape
    step = max(1, SCRATCH_ELEMENTS // max(1, cols))
    if rows <= step:
        return functional.linear(inputs, weights(slice(0, rows)), bias)
    step = max(64, step // 64 * 64)
    parts = []
    for first in range(0, rows, step):
        block = slice(first, min(first + step, rows))
        block_bias = None if bias is None else bias[block]
        parts.append(functional.linear(inputs, weights(block), block_bias))
    return torch.cat(parts, dim=-1)


def transposed_product_by_blocks(
    grad: torch.Tensor, shape: torch.Size, weights: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """Returns `grad @ all weights`, [..., cols], for `grad` [..., rows]; as above."""
    rows, cols = shape
    step = max(1, SCRATCH_ELEMENTS // max(1, cols))
    result = None
    for first in range(0, rows, step):
        block = slice(first, min(first + step, rows))
        part = grad[..., block] @ weights(block)
        result = part if result is None else result.add_(part)
    return grad.new_zeros(*grad.shape[:-1], cols) if result is None else result


def packed(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `int8_product`: multiplies bfloat16 inputs on the CPU with the codes, then scales."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    if col_scale is not None:
        flat = (flat * col_scale).to(inputs.dtype)
    # `reshape` keeps the strides of a transposed matrix, which the kernel refuses.
    sums = torch._weight_int8pack_mm(flat.contiguous(), codes, _ones(codes.shape[0]))
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
    """As `int8_product`: multiplies 16-bit inputs with the codes by our kernels for GPUs."""
    from codecllm.loader.kernels import int8_linear as kernels

    scaled = inputs if col_scale is None else (inputs * col_scale).to(inputs.dtype)
    return kernels.int8_linear(scaled, codes, scale, bias)


def can_fuse(inputs: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether `fused` can multiply these: inputs of 16 bits on a GPU for which Triton compiles."""
    return (
        is_accelerator(inputs.device)
        and inputs.dtype in (torch.bfloat16, torch.float16)
        and codes.is_contiguous()
        and _has_kernels(inputs.device)
    )


def can_pack(inputs: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether `packed` can and should multiply these.

    The kernel takes few rows of bfloat16, on a CPU for which it is fast.
    """
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


def int8_product(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes `inputs @ dequantized(codes, scale).T + bias` in the dtype of `inputs`.

    No gradient is recorded.

    Against `exact`, `packed` and `fused` differ by at most the rounding of the sum and of its
    product with the scale: 2^-8 of an output, besides the effect of another order of summation.
    With `col_scale` each input is rounded once more, which is 2^-8 of the sum of |input * weight|
    at most, and a tenth of that as a rule.

    Args:
        inputs: float [..., in].
        codes: int8 [out, in].
        scale: float32 [out].
        bias: [out] or None.
        col_scale: float32 [in] or None.

    Returns:
        [..., out], dtype of `inputs`.
    """
    if is_traced(codes):
        whole: torch.Tensor = _opaque_product(inputs, codes, scale, bias, col_scale)
        return whole
    return _product(inputs, codes, scale, bias, col_scale)


def transposed_product(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    col_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `grad @ dequantized(codes, scale)`, [..., in], for `grad` [..., out]."""

    def weights(block: slice) -> torch.Tensor:
        return dequantize_rows(codes[block], scale[block], grad.dtype, col_scale)

    return transposed_product_by_blocks(grad, codes.shape, weights)


def _product(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    col_scale: torch.Tensor | None,
) -> torch.Tensor:
    if can_fuse(inputs, codes):
        return fused(inputs, codes, scale, bias, col_scale)
    kernel = packed if can_pack(inputs, codes) else exact
    return kernel(inputs, codes, scale, bias, col_scale)


_opaque_product = torch.library.custom_op(
    "codecllm::int8_linear",
    _product,
    mutates_args=(),
    schema="(Tensor inputs, Tensor codes, Tensor scale, Tensor? bias, Tensor? col_scale) -> Tensor",
)
"""`_product` as one operation into which torch.compile does not look.

It could not follow how a kernel is chosen.
"""

_opaque_product.register_fake(
    lambda inputs, codes, *_: inputs.new_empty(*inputs.shape[:-1], codes.shape[0])
)


@lru_cache(maxsize=64)
def _ones(channels: int) -> torch.Tensor:
    """Returns scales for the kernel of `packed`.

    It takes them in bfloat16 only, and ours would move whole channels.
    """
    with torch.inference_mode(False):
        return torch.ones(channels, dtype=torch.bfloat16)


@cache
def _has_kernels(device: torch.device) -> bool:
    return why_no_kernels(device) is None
