"""Experts of whole models by the kernel of chosen experts, under Triton's interpreter."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional

import codecllm
from codecllm.loader import from_pretrained, pretrained
from codecllm.loader.experts import forward
from codecllm.loader.experts.code_stack import CodeStack, joined_codes
from codecllm.loader.experts.plane_stack import PlaneStack, joined_planes
from codecllm.loader.hf.experts import loops_over_experts
from codecllm.loader.kernels import int8_experts
from codecllm.loader.packed.form import PackedForm
from codecllm.loader.packed.matrix import pack_bf16, pack_codes
from codecllm.loader.resident.escapes import Escapes
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.joined_form import Stack
from codecllm.loader.resident.scaled_codes import ScaledCodes
from tests.integration import architectures

IDS = torch.arange(1, 8)[None]
BITS = torch.bfloat16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of containers by name of the architecture; weights in bfloat16."""
    folders = {}

    def get(name):
        if name not in folders:
            base = tmp_path_factory.mktemp("experts")
            source = architectures.make(name, base / "source")
            codecllm.convert(source, base / "c", scheme="int8", include=["*"], baseline=False)
            folders[name] = base / "c"
        return folders[name]

    return get


@pytest.fixture
def calls(monkeypatch):
    """Lets the kernel run on the CPU, and counts its layers."""
    counted = []
    real = int8_experts.experts_mlp

    def experts_mlp(*given):
        counted.append(given)
        return real(*given)

    monkeypatch.setattr(pretrained, "refuse_without_device", lambda *_: None)
    monkeypatch.setattr(forward, "runs_on", lambda device: True)
    monkeypatch.setattr(int8_experts, "experts_mlp", experts_mlp)
    return counted


def _load(folder, resident="int8"):
    return from_pretrained(folder, resident=resident, dtype=BITS)


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def _experts(model):
    return [module for module in model.modules() if loops_over_experts(module)]


@pytest.mark.parametrize(
    ("name", "resident"),
    [
        ("qwen3_moe", "int8"),
        ("qwen3_moe", "packed"),
        ("mixtral", "int8"),
        ("deepseek_v3", "int8"),
    ],
)
def test_a_model_gives_the_output_of_its_loop(made, calls, name, resident):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "runs_on", lambda device: False)
        expected = _logits(_load(made(name), resident))
    assert not calls
    model = _load(made(name), resident)
    torch.testing.assert_close(_logits(model), expected, rtol=0.03, atol=0.03)
    assert len(calls) == len(_experts(model)) > 0
    for module in _experts(model):
        assert all(type(weight.form) is CodeStack for weight in module.parameters())


def test_the_stack_has_the_bits_of_its_matrices(made, calls):
    model = _load(made("qwen3_moe"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "runs_on", lambda device: False)
        apart = _load(made("qwen3_moe"))
    for by_kernel, in_loop in zip(_experts(model), _experts(apart), strict=True):
        for one, other in zip(by_kernel.parameters(), in_loop.parameters(), strict=True):
            assert type(one.form) is CodeStack and type(other.form) is Stack
            assert torch.equal(one.detach() + 0, other.detach() + 0)
            assert torch.equal(one[1] + 0, other[1] + 0)
            assert one.form.nbytes == other.form.nbytes
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(_logits(again), _logits(model))
    assert torch.equal(_logits(copy.deepcopy(model)), _logits(model))
    saved = io.BytesIO()
    torch.save(_experts(model)[0].down_proj.form, saved)
    saved.seek(0)
    form = torch.load(saved, weights_only=True)
    assert torch.equal(form.matrix.codes, _experts(model)[0].down_proj.form.matrix.codes)


@pytest.fixture(scope="module")
def few_bits(tmp_path_factory):
    """A container of Qwen3-MoE at 4 bits, whose matrices have codes beyond 8 bits too."""
    base = tmp_path_factory.mktemp("few")
    source = architectures.make("qwen3_moe", base / "source")
    rate = {"bits": 4.0, "calibrate": "none"}
    codecllm.convert(source, base / "c", include=["*"], baseline=False, **rate)
    return base / "c"


@pytest.mark.parametrize("resident", ["packed", "int8"])
def test_codes_of_few_bits_run_by_the_kernel(few_bits, calls, resident):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "runs_on", lambda device: False)
        apart = _load(few_bits, resident)
        expected = _logits(apart)
    assert not calls
    model = _load(few_bits, resident)
    torch.testing.assert_close(_logits(model), expected, rtol=0.03, atol=0.03)
    assert len(calls) == len(_experts(model)) > 0
    kind = PlaneStack if resident == "packed" else CodeStack
    for by_kernel, in_loop in zip(_experts(model), _experts(apart), strict=True):
        for one, other in zip(by_kernel.parameters(), in_loop.parameters(), strict=True):
            assert type(one.form) is kind and type(other.form) is Stack
            assert torch.equal(one.detach() + 0, other.detach() + 0)
            assert torch.equal(one[1] + 0, other[1] + 0)
            assert torch.equal(one[2, 3:5] + 0, other[2, 3:5] + 0)


def test_a_stack_of_planes_travels(few_bits, calls):
    model = _load(few_bits, "packed")
    expected = _logits(model)
    assert torch.equal(_logits(pickle.loads(pickle.dumps(model))), expected)
    assert torch.equal(_logits(copy.deepcopy(model)), expected)
    form = _experts(model)[0].gate_up_proj.form
    for part in (form, form.member(1)):
        saved = io.BytesIO()
        torch.save(part, saved)
        saved.seek(0)
        again = torch.load(saved, weights_only=True)
        place = (torch.float32, torch.device("cpu"))
        assert torch.equal(again.dense(*place), part.dense(*place))
    assert form.moved(torch.device("cpu")) is form
    assert form.moved(torch.device("meta")).matrix.scale.is_meta
    sizes = sum(member.nbytes for member in form.parts_of)
    assert 0 <= form.nbytes - sizes < 2 * len(form.parts_of) * 2


def test_codes_beyond_8_bits_are_joined_and_other_matrices_stay_apart():
    codes = torch.arange(32 * 64, dtype=torch.int16).view(32, 64) - 1000
    narrow, escapes = codes.clamp(-127, 127).to(torch.int8), None
    row, column = (codes != narrow).nonzero().unbind(1)
    first = functional.pad((codes != narrow).sum(1).cumsum(0), (1, 0)).to(torch.int32)
    extra = (codes - narrow)[row, column].float()
    escapes = Escapes(first, column.to(torch.int32), extra, 64)
    scale = torch.rand(32)
    wide = Int8Form("w", ScaledCodes(narrow, scale, None, escapes))
    for form in (wide, PackedForm("p", pack_codes(codes, scale, None))):
        place = (torch.float32, torch.device("cpu"))
        assert torch.equal(
            joined_planes(Stack([form, form])).member(1).dense(*place), form.dense(*place)
        )
    with_columns = Int8Form("c", ScaledCodes(narrow, scale, torch.rand(64)))
    lossless = PackedForm("l", pack_bf16(torch.randn(32, 64).bfloat16()))
    odd = Int8Form("o", ScaledCodes(narrow[:, :40], scale))
    for members in ([wide, with_columns], [lossless, lossless], [odd, odd]):
        assert joined_planes(Stack(members)) is None
    assert joined_planes(None) is None
    assert joined_planes(wide) is None


def test_gradients_and_other_dtypes_run_in_the_loop(made, calls):
    model = _load(made("qwen3_moe"))
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None and not calls
    module = _experts(model)[0]
    module.gate_up_proj.data = module.gate_up_proj.data * 1  # dense from here on
    _logits(model)
    assert len(calls) == len(_experts(model)) - 1


def test_a_model_can_go_back_to_the_loop(made, calls):
    model = _load(made("qwen3_moe"))
    model.set_experts_implementation("eager")
    _logits(model)
    assert not calls


def test_codes_that_the_kernel_cannot_take_stay_apart(made, calls):
    model = _load(made("qwen3_moe"))
    stack = _experts(model)[0].down_proj.form
    assert joined_codes(stack) is stack
    assert joined_codes(None) is None
    assert joined_codes(stack.member(0)) is None
    unlike = Stack([stack.member(0), _experts(model)[0].gate_up_proj.form.member(0)])
    assert joined_codes(unlike) is None
