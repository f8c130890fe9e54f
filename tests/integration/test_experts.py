"""Fused experts stay coded in memory, only routed ones are decoded, and writes are never lost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from codecllm.converter import convert
from codecllm.loader import from_pretrained
from codecllm.loader.hf.experts import loops_over_experts
from codecllm.loader.resident.coded_weight import CodedWeight
from codecllm.loader.resident.joined_form import Rows, Stack, concatenated, stacked
from tests.integration import architectures
from tests.integration.outputs import in_experts_loop

FUSED = ("qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "qwen2_moe")
IDS = torch.arange(1, 21)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of sources and containers by name of the architecture and scheme."""
    folders = {}

    def get(name, scheme):
        if (name, scheme) not in folders:
            base = tmp_path_factory.mktemp("experts")
            source = architectures.make(name, base / "source")
            include = ("*",) if scheme == "int8" else ()
            convert(source, base / "c", scheme=scheme, include=include)
            folders[name, scheme] = base / "c"
        return folders[name, scheme]

    return get


def _experts(model):
    return [module for module in model.modules() if loops_over_experts(module)]


def _logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def _dense(folder):
    return in_experts_loop(from_pretrained(folder, resident="dense"))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    ("scheme", "resident"),
    [("int8", "int8"), ("int8", "compressed"), ("lossless", "compressed")],
)
def test_experts_stay_coded_and_give_the_output_of_dense(made, name, scheme, resident):
    dense = _dense(made(name, scheme))
    model = from_pretrained(made(name, scheme), resident=resident)
    assert _experts(model)
    for module in _experts(model):
        weights = list(module.parameters())
        assert len(weights) == 2
        for weight in weights:
            assert type(weight) is CodedWeight
            assert type(weight.form) is Stack
            assert not weight.is_loading
            assert not weight.requires_grad
    if resident == "int8":
        torch.testing.assert_close(_logits(model), _logits(dense), rtol=0.02, atol=0.02)
    else:
        assert torch.equal(_logits(model), _logits(dense))
    for (name, plain), coded in zip(dense.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(coded.detach() + 0, plain), name


def test_only_routed_experts_are_decoded(made, monkeypatch):
    model = from_pretrained(made("qwen3_moe", "int8"), resident="compressed")
    forms = [weight.form for module in _experts(model) for weight in module.parameters()]
    matrices = [matrix for form in forms for matrix in form.parts_of]
    parts = [part for matrix in matrices for part in getattr(matrix, "parts_of", [matrix])]
    assert len(parts) == 2 * 4 * 3  # layers, experts, gate and up and down
    asked = []
    product = type(parts[0]).product
    monkeypatch.setattr(
        type(parts[0]),
        "product",
        lambda form, *arguments: asked.append(id(form)) or product(form, *arguments),
    )
    _logits(model, IDS[:, :1])
    # One token, two layers, two experts of four, three matrices.
    assert len(set(asked) & set(map(id, parts))) == 2 * 2 * 3


def test_no_dense_copy_of_the_experts_is_counted(made):
    folder = made("qwen3_moe", "int8")
    coded, dense = from_pretrained(folder, resident="int8"), _dense(folder)
    for module, plain in zip(_experts(coded), _experts(dense), strict=True):
        taken = sum(weight.nbytes for weight in module.parameters())
        assert taken < 0.6 * sum(weight.nbytes for weight in plain.parameters())
        assert sum(weight.numel() for weight in module.parameters()) == sum(
            weight.numel() for weight in plain.parameters()
        )


@pytest.mark.parametrize("resident", ["int8", "compressed"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda weight: weight[2].mul_(3),
        lambda weight: weight[torch.tensor(2)].add_(1),
        lambda weight: weight.data[1, 3:5].zero_(),
        lambda weight: weight.copy_(weight * 2),
        lambda weight: weight.select(0, 3).T.fill_(0.5),
        lambda weight: weight.__setitem__(0, weight[1]),
    ],
)
def test_a_write_to_one_expert_reaches_the_model(made, resident, edit):
    folder = made("qwen3_moe", "int8")
    dense, model = _dense(folder), from_pretrained(folder, resident=resident)
    for each in (dense, model):
        with torch.no_grad():
            edit(_experts(each)[0].gate_up_proj)
    changed = _experts(model)[0].gate_up_proj
    assert torch.equal(changed.detach() + 0, _experts(dense)[0].gate_up_proj)
    assert type(_experts(model)[1].gate_up_proj) is CodedWeight
    torch.testing.assert_close(_logits(model), _logits(dense), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("resident", ["int8", "compressed"])
def test_copies_casts_and_pickles(made, resident):
    folder = made("mixtral", "int8")
    model = from_pretrained(folder, resident=resident)
    expected = _logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(_experts(other)[0].down_proj) is CodedWeight
        assert torch.equal(_logits(other), expected)
    one = _experts(model)[0].gate_up_proj[1]
    assert torch.equal(pickle.loads(pickle.dumps(one)), one + 0)
    wide = from_pretrained(folder, resident="dense", dtype=torch.float32)
    for module, plain in zip(_experts(model), _experts(wide), strict=True):
        cast = module.gate_up_proj.to(torch.float32)
        assert torch.equal(cast + 0, plain.gate_up_proj)


def test_gradients_pass_through_experts(made):
    folder = made("qwen3_moe", "int8")
    gradients = []
    for model in (_dense(folder), from_pretrained(folder, resident="compressed")):
        inputs = model.get_input_embeddings()(IDS).detach().float().to(torch.bfloat16)
        inputs.requires_grad_(True)
        model(inputs_embeds=inputs).logits.float().square().sum().backward()
        gradients.append(inputs.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.05, atol=0.01)


def test_transposed_experts_are_loaded_dense(made):
    model = from_pretrained(made("gpt_oss", "lossless"), resident="compressed")
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    assert experts
    assert all(type(module.gate_up_proj) is nn.Parameter for module in experts)
    assert torch.equal(_logits(model), _logits(_dense(made("gpt_oss", "lossless"))))


def test_what_a_user_joins_is_plain(made):
    model = from_pretrained(made("qwen3_moe", "int8"), resident="int8")
    first, second = (layer.self_attn.q_proj.weight for layer in model.model.layers)
    assert type(first) is CodedWeight
    for joined in (torch.stack([first, second]), torch.cat([first, second])):
        assert type(joined) is torch.Tensor


@pytest.fixture(scope="module")
def forms(made):
    """The forms of two experts' matrices of one layer."""
    model = from_pretrained(made("qwen3_moe", "int8"), resident="int8")
    return _experts(model)[0].down_proj.form.parts_of[:2]


def test_rows_are_the_parts_one_below_the_other(forms):
    rows = concatenated(forms, 0)
    assert type(rows) is Rows
    cpu = torch.device("cpu")
    whole = torch.cat([form.dense(torch.float32, cpu) for form in forms])
    assert rows.shape == whole.shape
    assert torch.equal(rows.dense(torch.float32, cpu), whole)
    inputs = torch.randn(3, whole.shape[1], generator=torch.Generator().manual_seed(0))
    bias = torch.arange(whole.shape[0]).float()
    torch.testing.assert_close(rows.product(inputs, bias), inputs @ whole.T + bias)
    grad = torch.randn(3, whole.shape[0], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rows.transposed_product(grad), grad @ whole)
    places = torch.tensor([5, 0, whole.shape[0] - 1])
    assert torch.equal(rows.gather(places, torch.float32, cpu), whole[places])


def test_products_with_a_whole_stack_are_those_of_torch(forms):
    stack, cpu = stacked(forms), torch.device("cpu")
    whole = stack.dense(torch.float32, cpu)
    grad = torch.randn(len(forms), 3, whole.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(stack.transposed_product(grad), grad @ whole)
    inputs = torch.ones(3, whole.shape[2])
    with pytest.raises(RuntimeError) as expected:
        torch.nn.functional.linear(inputs, whole)
    with pytest.raises(RuntimeError) as caught:
        stack.product(inputs, None)
    assert str(caught.value) == str(expected.value)


def test_parts_that_do_not_fit_are_not_joined(forms, made):
    model = from_pretrained(made("qwen3_moe", "int8"), resident="int8")
    other = model.model.layers[0].self_attn.q_proj.weight.form
    assert other.shape != forms[0].shape
    assert stacked([forms[0], other]) is None
    assert concatenated([forms[0], other], 0) is None
    assert concatenated(forms, 1) is None
    assert concatenated([stacked(forms), stacked(forms)], 0) is None
    assert concatenated([stacked(forms), forms[0]], 1) is None


def _with_adapter(model):
    """The model with a LoRA adapter on its experts, with weights that are drawn."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        lora_dropout=0.0,
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in sorted(adapted.named_parameters()):
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return adapted


@pytest.mark.parametrize("resident", ["int8", "compressed"])
def test_adapters_on_experts_run_train_and_merge(made, resident):
    folder = made("mixtral", "int8")
    plain = _with_adapter(_dense(folder))
    adapted = _with_adapter(from_pretrained(folder, resident=resident))
    gradients = []
    for model in (plain, adapted):
        model(IDS).logits.float().square().mean().backward()
        gradients.append(
            {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        )
    assert len(gradients[0]) == len(gradients[1]) == 12
    assert not torch.equal(_logits(plain), _logits(_dense(folder)))
    bounds = {"rtol": 0.1, "atol": 0.05} if resident == "int8" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(_logits(adapted), _logits(plain), **bounds)
    if resident == "compressed":
        torch.testing.assert_close(gradients[1], gradients[0], **bounds)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(_logits(merged), _logits(plain.merge_and_unload()), **bounds)
