"""Times products with packed matrices beside bf16 and cuBLAS: the data of the chosen shapes.

`python -m benchmarks.device.packed` needs a GPU. Every product is recorded in a CUDA graph that
goes over several copies of the weights, more than the second-level cache holds. Figures are
microseconds a product, and the ratio to bf16.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from codecllm.loader.packed import kernels, matrix, product, warpgroups, warps

SIZES = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (28672, 4096), (6144, 4096))
"""The last two are what engines make of a gate and its up, and of q, k and v."""
TOKENS = (1, 2, 8, 16, 32, 64, 128, 256)
BITS = {3: 1.4, 4: 2.6, 5: 5.2, 6: 10.0, 7: 20.0, 8: 31.0, 12: 0.0}
"""Bits of the layout -> spread of Gaussian codes for which they are chosen."""

BYTES = 400 << 20
"""Weights of a graph: several times the second-level cache."""

TRIED = {
    1: [(1, 1, 4, 1, 3), (1, 1, 8, 1, 3), (1, 1, 16, 1, 3), (2, 1, 16, 1, 3), (2, 2, 4, 1, 3)],
    2: [(2, 2, 2, 4, 4), (2, 4, 2, 4, 4), (2, 4, 4, 4, 4), (2, 8, 1, 4, 3), (2, 8, 2, 2, 3)],
    4: [(1, 4, 2, 4, 4), (1, 8, 2, 4, 3), (2, 4, 2, 4, 4), (2, 8, 1, 4, 4), (2, 8, 2, 2, 3)],
    8: [(1, 4, 2, 4, 3), (1, 8, 2, 4, 3), (2, 4, 2, 4, 3), (2, 8, 1, 2, 4), (2, 8, 1, 4, 3)],
}
"""Tiles of 8 tokens -> row tiles, row warps, column warps, splits and stages to try."""

TRIED_GROUPS = [
    (groups, splits, stages, step_tiles)
    for groups in (1, 2, 4)
    for splits in (1, 2, 4, 8)
    for stages, step_tiles in ((4, 1), (3, 2))
]
"""Warpgroups of a block, splits, stages and tiles of a step to try."""


def time_us(calls: list[Callable[[], object]]) -> float:
    """Returns the median time of one of the calls, in microseconds."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def host_us(call: Callable[[], object], count: int = 300) -> float:
    """Returns the host time of a call, in microseconds."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - begin) / count * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def make(bits: int, rows: int, cols: int) -> matrix.PackedMatrix:
    """Returns a random packed matrix."""
    if bits == 12:
        packed_matrix = matrix.pack_bf16((torch.randn(rows, cols, device="cuda") * 0.02).bfloat16())
        assert packed_matrix is not None
        return packed_matrix
    codes = (torch.randn(rows, cols, device="cuda") * BITS[bits]).round()
    if bits == 8:
        codes = codes.clamp(-127, 127)
    scale = torch.rand(rows, device="cuda") * 1e-3 + 1e-3
    return matrix.pack_codes(codes.to(torch.int16), scale, None)


def check(packed: matrix.PackedMatrix) -> float:
    """Returns the largest error of a product relative to the largest output."""
    weights = matrix.dequantize(packed, torch.float32).double()
    worst = 0.0
    for tokens in (1, 3, 8, 9, 16, 33, 64, 100, 256):
        inputs = torch.randn(tokens, packed.cols, device="cuda").bfloat16()
        got = product.PackedProduct(packed).linear(inputs, None).double()
        exact = inputs.double() @ weights.T
        worst = max(worst, float((got - exact).abs().max() / exact.abs().max()))
    dense = product.PackedProduct(packed).dense(torch.bfloat16)
    same = torch.equal(
        dense.view(torch.int16), matrix.dequantize(packed, torch.bfloat16).view(torch.int16)
    )
    assert same, "unpacking differs from the reference"
    return worst


def main() -> None:
    """Prints one line for each size, kind and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all-shapes", action="store_true", help="time every shape of the kernel")
    arguments = parser.parse_args()
    compile_all()
    for bits in BITS:
        print(f"check {bits} bits: {check(make(bits, 1008, 2064)):.2e}", flush=True)
    for rows, cols in SIZES:
        _time_size(rows, cols, arguments.all_shapes)


def _time_size(rows: int, cols: int, all_shapes: bool) -> None:
    copies = max(2, BYTES // (2 * rows * cols))
    dense = [torch.randn(rows, cols, device="cuda").bfloat16() for _ in range(copies)]
    plain = {
        tokens: time_us(
            [partial(torch.nn.functional.linear, _inputs(tokens, cols), w) for w in dense]
        )
        for tokens in (*TOKENS, 2048)
    }
    figures = ", ".join(f"{tokens}: {time:.1f} us" for tokens, time in plain.items())
    host = host_us(partial(torch.nn.functional.linear, _inputs(1, cols), dense[0]))
    print(f"\n{rows} x {cols}: bf16 {figures}; host {host:.1f} us")
    for bits in BITS:
        products = [product.PackedProduct(make(bits, rows, cols))]
        size = products[0].matrix.nbytes()
        for _ in range(max(2, BYTES // size) - 1):
            products.append(product.PackedProduct(make(bits, rows, cols)))
        line = f"{bits:2} bits, {8 * size / rows / cols:.2f} in memory:"
        for tokens, reference in plain.items():
            calls = [partial(one.linear, _inputs(tokens, cols), None) for one in products]
            time = time_us(calls)
            line += f"  {tokens}: {time:.1f} ({reference / time:.2f})"
            if all_shapes and tokens in (1, 16, 32, 64, 128, 256):
                line += _all_shapes(products, tokens)
        host = host_us(partial(products[0].linear, _inputs(1, cols), None))
        print(f"{line}; host {host:.1f} us", flush=True)


def _inputs(tokens: int, cols: int) -> torch.Tensor:
    return torch.randn(tokens, cols, device="cuda").bfloat16()


def _all_shapes(products: list[product.PackedProduct], tokens: int) -> str:
    device = torch.device("cuda", torch.cuda.current_device())
    if tokens > product.FEW and product.has_groups(device):
        tiles = next(tiles for tiles in (2, 4, 8, 16) if 8 * tiles >= min(tokens, 128))
        tried = [(warpgroups.GroupShape(tiles, *rest), rest) for rest in TRIED_GROUPS]
        return _timed_shapes(warpgroups, "choose_group_shape", products, tokens, tried)
    tiles = min(t for t in TRIED if 8 * t >= tokens)
    shapes = [
        (warps.Shape(row_tiles, tiles, row_warps, col_warps, splits, stages), rest)
        for rest in TRIED[tiles]
        for row_tiles, row_warps, col_warps, splits, stages in [rest]
    ]
    return _timed_shapes(warps, "choose_shape", products, tokens, shapes)


def _timed_shapes(
    module: Any,
    name: str,
    products: list[product.PackedProduct],
    tokens: int,
    shapes: list[tuple[Any, tuple[int, ...]]],
) -> str:
    """Times shapes: `module.name` chooses the shape of a product."""
    choose = getattr(module, name)
    shared = kernels.shared_memory(torch.device("cuda", torch.cuda.current_device()))
    bits, cols = products[0].matrix.bits, products[0].matrix.cols
    figures = []
    for shape, numbers in shapes:
        fitting = shape.within(bits, shared)
        setattr(module, name, lambda *_, fitting=fitting: fitting)
        fresh = [product.PackedProduct(one.matrix) for one in products]
        time = time_us([partial(one.linear, _inputs(tokens, cols), None) for one in fresh])
        figures.append("/".join(map(str, numbers)) + f"={time:.1f}")
    setattr(module, name, choose)
    return " [" + " ".join(figures) + "]"


def compile_all() -> None:
    """Compiles the kernels of all sizes side by side: a second each otherwise."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    shared = kernels.shared_memory(device)
    wanted = set()
    for bits, tokens, (rows, cols) in itertools.product(BITS, TOKENS, SIZES):
        if tokens > product.FEW and product.has_groups(device):
            shape = warpgroups.choose_group_shape(tokens, rows, cols, bits, shared)
            wanted.add(("packed_groups", shape.source(bits, False)))
        elif tokens <= warps.MAX_TOKENS:
            few = warps.choose_shape(tokens, rows, cols, bits, shared)
            wanted.add(("packed_linear", few.source(bits, False)))
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(kernels.kernel_of, *one, device) for one in wanted]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
