"""Times products with packed matrices beside those of Humming: `pip install humming-kernels`.

    python -m benchmarks.device.humming                # two minutes, most of it compiling
    python -m benchmarks.device.humming --bits 4 --tokens 1 64

Both multiply bfloat16 inputs with weights of the same size and width and one scale a row; Humming
rounds random weights to its own codes, ours have their exceptions. Every product is recorded in a
CUDA graph over more weights than the second-level cache holds. Figures are microseconds a product
and, in brackets, how many times as fast as bf16 of cuBLAS in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.device.packed import BYTES, host_us, make, time_us
from codecllm.loader.packed.product import PackedProduct

SIZES = ((14336, 4096), (4096, 4096))
TOKENS = (1, 8, 16, 32, 64, 128, 256, 2048)
WIDTHS = (4, 6, 8)

Product = Callable[[torch.Tensor], torch.Tensor]


def humming_layer(bits: int, rows: int, cols: int) -> Product:
    """Returns a layer [rows, cols] of Humming with random weights, symmetric codes of `bits`."""
    from humming.layer import HummingLayer

    layer: Any = HummingLayer(
        shape_n=rows,
        shape_k=cols,
        weight_config={"dtype": f"int{bits}"},
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized((torch.randn(rows, cols, device="cuda") * 0.02).bfloat16())
    layer.transform()
    product: Product = layer
    return product


def packed_product(bits: int, rows: int, cols: int) -> Product:
    """Returns a packed matrix [rows, cols] of random codes as a product."""
    return partial(PackedProduct(make(bits, rows, cols)).linear, bias=None)


def copies_of(make_one: Callable[[], Product], matrix_bytes: int) -> list[Product]:
    """Returns as many products as take more memory than the cache."""
    return [make_one() for _ in range(max(2, BYTES // matrix_bytes))]


def compare(rows: int, cols: int, widths: list[int], tokens: list[int]) -> None:
    """Prints a line for each width and maker."""
    dense = [torch.randn(rows, cols, device="cuda").bfloat16() for _ in range(4)]
    inputs = {number: torch.randn(number, cols, device="cuda").bfloat16() for number in tokens}
    plain = {
        number: time_us([partial(functional.linear, inputs[number], weight) for weight in dense])
        for number in tokens
    }
    host = host_us(partial(functional.linear, inputs[tokens[0]], dense[0]))
    figures = "  ".join(f"{number}: {time:.1f}" for number, time in plain.items())
    print(f"\n{rows} x {cols}\nbf16            {figures}  host {host:.1f}", flush=True)
    for bits in widths:
        for name, maker in (("packed", packed_product), ("Humming", humming_layer)):
            made = copies_of(partial(maker, bits, rows, cols), rows * cols * bits // 8)
            line = f"{name:8}{bits} bits "
            for number, reference in plain.items():
                time = time_us([partial(one, inputs[number]) for one in made])
                line += f"  {number}: {time:.1f} ({reference / time:.2f})"
            host = host_us(partial(made[0], inputs[tokens[0]]))
            print(f"{line}  host {host:.1f}", flush=True)


def main() -> None:
    """Compares both for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    options = parser.parse_args()
    with torch.inference_mode():
        for rows, cols in SIZES:
            compare(rows, cols, options.bits, options.tokens)


if __name__ == "__main__":
    main()
