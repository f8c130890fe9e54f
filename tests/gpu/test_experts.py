"""Experts of whole models by the kernel of chosen experts."""

from __future__ import annotations

import pytest
import torch

import codecllm
from codecllm.loader import from_pretrained
from codecllm.loader.experts.code_stack import CodeStack
from codecllm.loader.experts.plane_stack import PlaneStack
from codecllm.loader.hf.experts import loops_over_experts
from tests.integration import architectures

RATES = {"int8": {"scheme": "int8"}, "packed": {"bits": 4.0, "calibrate": "none"}}


@pytest.fixture(
    scope="module",
    params=[("qwen3_moe", "int8"), ("qwen3_moe", "packed"), ("mixtral", "int8")],
    ids="-".join,
)
def model(request, tmp_path_factory):
    name, resident = request.param
    base = tmp_path_factory.mktemp("experts")
    source = architectures.make(name, base / "source")
    codecllm.convert(source, base / "c", include=["*"], baseline=False, **RATES[resident])
    return from_pretrained(
        base / "c", resident=resident, dtype=torch.bfloat16, device_map={"": "cuda:0"}
    )


def _experts(model):
    return [module for module in model.modules() if loops_over_experts(module)]


@pytest.mark.parametrize("tokens", [1, 5, 90])
@torch.inference_mode()
def test_a_layer_gives_the_output_of_its_loop(model, tokens):
    for module in _experts(model):
        assert all(type(weight.form) in (CodeStack, PlaneStack) for weight in module.parameters())
        hidden = torch.randn(tokens, module.down_proj.shape[1], device="cuda").bfloat16()
        scores = torch.rand(tokens, module.down_proj.shape[0], device="cuda")
        shares, numbers = scores.topk(2)
        by_kernel = module(hidden, numbers, shares.bfloat16())
        looped = type(module).forward.__wrapped__(module, hidden, numbers, shares.bfloat16())
        torch.testing.assert_close(by_kernel.float(), looped.float(), rtol=0.02, atol=0.02)


@torch.inference_mode()
def test_a_cuda_graph_replays_experts_that_were_chosen_later(model):
    module = _experts(model)[0]
    hidden = torch.randn(40, module.down_proj.shape[1], device="cuda").bfloat16()
    numbers = torch.zeros(40, 2, dtype=torch.int64, device="cuda")
    shares = torch.full((40, 2), 0.5, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(hidden, numbers, shares)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(hidden, numbers, shares)
    for number in range(module.down_proj.shape[0]):
        numbers.copy_(torch.randint(0, number + 1, (40, 2)))
        graph.replay()
        assert torch.equal(out, module(hidden, numbers, shares))
