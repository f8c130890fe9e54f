"""Packed weights on a real GPU: kernels equal the reference, models equal dense ones."""

from __future__ import annotations

import pytest
import torch

from codecllm.loader import from_pretrained
from codecllm.loader.kernels.on_device import current_stream
from codecllm.loader.packed import layout, matrix, pack, product
from codecllm.loader.packed.form import PackedForm
from codecllm.loader.resident.coded_weight import CodedWeight


def _packed(bits, rows, cols, monkeypatch):
    generator = torch.Generator("cuda").manual_seed(bits)
    noise = torch.randn(rows, cols, generator=generator, device="cuda")
    if bits == layout.BF16_BITS:
        return matrix.pack_bf16((noise * 0.02).bfloat16())
    monkeypatch.setattr(pack, "choose_int_bits", lambda codes: bits)
    codes = (noise * 2.0 ** (bits - 2.6)).round().to(torch.int16)
    scale = torch.rand(rows, generator=generator, device="cuda") + 0.1
    col_scale = torch.rand(cols, generator=generator, device="cuda") + 0.5
    return matrix.pack_codes(codes, scale, col_scale if bits % 2 else None)


@pytest.mark.parametrize("bits", [*layout.INT_BITS, layout.BF16_BITS])
@pytest.mark.parametrize(("rows", "cols"), [(1000, 2064), (8208, 1024), (48, 8208)])
def test_products_and_unpacking(bits, rows, cols, monkeypatch):
    packed = _packed(bits, rows, cols, monkeypatch)
    whole = product.PackedProduct(packed)
    assert torch.equal(whole.dense(torch.bfloat16), matrix.dequantize(packed, torch.bfloat16))
    chosen_rows = torch.randint(0, rows, (100,), device="cuda")
    expected = matrix.gather(packed, chosen_rows, torch.bfloat16)
    assert torch.equal(whole.gather(chosen_rows, torch.bfloat16), expected)
    weights = matrix.dequantize(packed, torch.float32).double()
    for tokens in (1, 3, 8, 9, 16, 31, 64, 65, 130, 256, 257):
        inputs = torch.randn(tokens, cols, device="cuda").bfloat16()
        bias = torch.randn(rows, device="cuda").bfloat16()
        exact = inputs.double() @ weights.T + bias.double()
        error = (whole.linear(inputs, bias).double() - exact).abs().max()
        assert error <= 2.0**-7 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(n, s) for n in ("llama", "qwen3") for s in ("int8", "lossless")] + [("bert", "int8")],
)
def test_models_stay_near_dense(container, name, scheme):
    folder = container(name, scheme)
    ids = torch.arange(3, 23, device="cuda").reshape(2, 10)
    with torch.inference_mode():
        expected = from_pretrained(folder, device_map="cuda")(input_ids=ids)[0]
        model = from_pretrained(folder, device_map="cuda", resident="packed")
        assert (model(input_ids=ids)[0] - expected).norm() <= 0.02 * expected.norm()
    forms = [w.form for w in model.parameters() if isinstance(w, CodedWeight)]
    assert forms
    assert all(isinstance(form, PackedForm) for form in forms)
    assert all(form.matrix.words.is_cuda for form in forms)


def test_a_static_cache_generates_the_same_tokens(container):
    model = from_pretrained(container("qwen3", "int8"), device_map="cuda", resident="packed")
    prompt = {
        "input_ids": torch.arange(5, 12)[None].cuda(),
        "attention_mask": torch.ones(1, 7, dtype=torch.int64).cuda(),
    }
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options, cache_implementation="static"), plain)


def test_a_cuda_graph_replays_products(monkeypatch):
    packed = product.PackedProduct(_packed(5, 4096, 1024, monkeypatch))
    inputs = torch.randn(1, 1024, device="cuda").bfloat16()
    packed.linear(inputs, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed.linear(inputs, None)
    inputs.copy_(torch.randn_like(inputs))
    graph.replay()
    assert torch.equal(out, packed.linear(inputs, None))


def test_the_handle_of_a_stream_is_torchs(gpu):
    side = torch.cuda.Stream(gpu)
    with torch.cuda.stream(side):
        assert current_stream(gpu) == side.cuda_stream
    assert current_stream(gpu) == torch.cuda.current_stream(gpu).cuda_stream
