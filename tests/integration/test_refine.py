"""`convert --refine`: from the layers' inputs to codes that `verify --source` accepts."""

from __future__ import annotations

import copy
import json
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import codecllm
from codecllm import api
from codecllm.calibrator import calibrate, calibration, device_feedback, text
from codecllm.calibrator.device_feedback import DeviceFeedback, DeviceProducts, StagedProducts
from codecllm.calibrator.inputs import input_products
from codecllm.calibrator.text import own_text
from codecllm.cli import checking, converting, reading  # noqa: F401 - they register commands
from codecllm.cli.app import app
from codecllm.converter.source.source import SourceModel
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.loader import places, pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.places import CPU
from tests.integration import tiny_models

MATRICES = ("*_proj.weight", "*embed_tokens*")
SIZES = {
    **tiny_models.GROUPED,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 80,
}


OTHER = torch.device("cpu", 0)
"""Stands in for another device: the same memory under another name."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = hf.LlamaConfig(**SIZES, tie_word_embeddings=True)
    return tiny_models.save(
        tmp_path_factory.mktemp("refine") / "source", hf.LlamaForCausalLM(config)
    )


@pytest.fixture(scope="module")
def model(source):
    return load_plain(source, torch.float32).eval()


def _shapes(model):
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


@pytest.mark.parametrize(("bits", "rounding"), [(3.5, "feedback-deadzone"), (5, "feedback")])
def test_a_refined_container_has_its_bits_and_verifies(
    tmp_path, source, monkeypatch, bits, rounding
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    stages = {}

    def on_stage(text):
        stages[text] = list(temporary.iterdir())

    asked = {"bits": bits, "refine": True, "include": MATRICES, "baseline": False}
    report = api.convert(source, tmp_path / "out", on_stage=on_stage, **asked).report
    assert any("pairs of inputs" in text for text in stages) and any(
        "refining" in text for text in stages
    )
    assert not any(stages.values())
    assert report.quantized_bits_per_weight == pytest.approx(bits, rel=0.005)
    manifest = report.manifest
    assert manifest.options.refine is True
    assert manifest.calibration.tokens == 64 * 77
    roundings = {
        record.name: record.rounding for record in manifest.tensors if record.scheme == "int8"
    }
    assert {roundings.pop("model.embed_tokens.weight"), rounding} <= {
        "nearest",
        "deadzone",
        rounding,
    }
    assert len(roundings) == 14 and set(roundings.values()) == {rounding}
    assert any(
        "1 of 15 tensors are rounded without refinement" in warning for warning in report.warnings
    )
    verified = codecllm.verify(tmp_path / "out", source=source, baseline=False)
    assert verified.ok and rounding in verified.to_json()


def test_a_coarse_parameter_that_the_load_forgot_is_found(tmp_path, source, monkeypatch):
    """Few bits leave a tensor near zero; a load that fills half of one does that too."""
    name = "model.layers.0.mlp.up_proj.weight"
    api.convert(source, tmp_path / "out", bits=5, include=MATRICES, baseline=False)
    load = pretrained.load_opened

    def forgetful(*arguments):
        model = load(*arguments)
        model.get_parameter(name).data[8:] = 0
        return model

    monkeypatch.setattr(pretrained, "load_opened", forgetful)
    verified = codecllm.verify(tmp_path / "out", source=source, baseline=False)
    findings = [finding for stage in verified.stages for finding in stage.findings]
    assert not verified.ok
    assert any(finding.error.tensor == name for finding in findings)


def test_the_text_begins_as_it_does_without_refinement(model):
    text = own_text(model, 70)
    assert text.shape == (64, 70)
    assert torch.equal(text[:, :64], own_text(model))


def test_tokens_are_drawn_as_often_as_the_model_expects_them():
    shares = torch.tensor([0.0, 0.3, 0.0, 0.6, 0.1, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn_tokens = text.drawn(shares.log().expand(20000, -1), generator)
    assert drawn_tokens.shape == (20000, 1)
    counts = torch.bincount(drawn_tokens.flatten(), minlength=6) / 20000
    assert torch.allclose(counts, shares, atol=0.012)
    assert counts[0] == counts[2] == counts[5] == 0


def test_no_logits_are_computed_unless_the_head_is_refined(model):
    tokens, widths = torch.arange(8 * 20).reshape(8, 20) % 512, []
    hook = model.lm_head.register_forward_pre_hook(
        lambda _, inputs: widths.append(inputs[0].shape[1])
    )
    names = {"model.layers.0.mlp.up_proj.weight"}
    apart = copy.deepcopy(model)
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    sums = input_products(model, tokens, _shapes(model), names)
    hook.remove()
    assert widths == [1, 1] and sums.tokens(0) == 160
    both = input_products(apart, tokens, _shapes(apart), {"lm_head.weight", *names})
    assert both.tokens(both.number("lm_head.weight")) == 160


def test_sums_are_those_of_what_enters_the_layers_and_layers_with_the_same_inputs_share_them(model):
    tokens = torch.arange(7 * 20).reshape(7, 20) % 512
    products = input_products(
        model, tokens, _shapes(model), {name for name in _shapes(model) if "layers.1" in name}
    )
    seen, hooks = {}, []

    def watch(name):
        return lambda _, inputs: seen.update({name: inputs[0].reshape(-1, inputs[0].shape[-1])})

    for name, module in model.model.layers[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(watch(name)))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(products) == 7
    numbers = {name: products.number(f"model.layers.1.{name}.weight") for name in seen}
    for name, inputs in seen.items():
        assert products.tokens(numbers[name]) == 140
        expected = (inputs.T @ inputs).numpy()
        assert np.allclose(
            products.matrix(numbers[name]),
            expected,
            rtol=1e-3,
            atol=1e-3 * expected.diagonal().mean(),
        ), name
    shared = [
        {numbers[f"self_attn.{name}_proj"] for name in "qkv"},
        {numbers["mlp.gate_proj"], numbers["mlp.up_proj"]},
    ]
    assert [len(some) for some in shared] == [1, 1] and len(set(numbers.values())) == 4


@pytest.mark.parametrize(("room", "passes"), [(0, 14), (4 * 3 * 128**2, 6), (1 << 30, 1)])
def test_sums_without_room_for_all_are_added_up_in_several_runs(tmp_path, model, room, passes):
    tokens, told = torch.arange(7 * 20).reshape(7, 20) % 512, []
    names = {name for name in _shapes(model) if name.endswith("proj.weight")}
    once = input_products(model, tokens, _shapes(model), names)
    staged = StagedProducts(OTHER, room, tmp_path)
    got = input_products(model, tokens, _shapes(model), names, lambda *d: told.append(d), staged)
    assert got is staged and not staged._staged
    assert set(got.names()) == set(once.names()) == names
    assert told[-1] == (7 * passes, 7 * passes) and len(told) == 2 * passes
    for name in names:
        numbers = once.number(name), got.number(name)
        assert got.tokens(numbers[1]) == once.tokens(numbers[0]) == 140
        assert np.array_equal(got.matrix(numbers[1]), once.matrix(numbers[0]))


def test_a_device_without_memory_is_one_error(tmp_path, source, other_device, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate 64 MiB")

    monkeypatch.setattr(device_feedback, "codes_on_device", full)
    with pytest.raises(UnsupportedEnvironmentError, match="too little memory to refine") as caught:
        api.convert(source, tmp_path / "out", device="cuda", **REFINED)
    assert caught.value.tensor == "model.layers.0.mlp.down_proj.weight"
    assert "64 MiB" in str(caught.value) and not (tmp_path / "out").exists()


class Branching(torch.nn.Module):
    """Two layers with equal inputs for short sequences only, and one layer apart."""

    def __init__(self):
        super().__init__()
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.words = torch.nn.Embedding(9, 4)
        self.first, self.second, self.third = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))
        self.tied = torch.nn.Linear(4, 9, bias=False)
        self.tied.weight = self.words.weight

    def forward(self, input_ids):
        entering = self.words(input_ids)
        first = self.first(entering)
        second = self.second(entering if input_ids[0, 0] == 0 else entering + 1)
        return self.tied(self.third(first + second))


def test_a_layer_that_does_not_share_its_inputs_after_all_has_no_sum():
    model = Branching()
    names = {"first.weight", "second.weight", "third.weight", "tied.weight"}
    steady, moving = torch.zeros((8, 3), dtype=torch.int64), torch.zeros((8, 3), dtype=torch.int64)
    moving[4:] = 1
    with torch.no_grad():
        assert set(input_products(model, steady, _shapes(model), names).names()) == names - {
            "tied.weight"
        }
        assert set(input_products(model, moving, _shapes(model), names).names()) == {
            "first.weight",
            "third.weight",
        }
        model.words.weight[0, 0] = torch.inf
        assert not len(input_products(model, steady, _shapes(model), names))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "refine needs bits"),
        ({"bits": 5, "calibrate": "none"}, "refine needs a calibration"),
        ({"bits": 5, "scheme": "lossless"}, "scheme int8"),
    ],
)
def test_what_cannot_be_refined_is_refused(tmp_path, source, asked, message):
    with pytest.raises(UsageError, match=message):
        api.convert(source, tmp_path / "out", refine=True, baseline=False, **asked)
    assert not (tmp_path / "out").exists()


def _with_config(source, folder, **entries):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(entries))
    return folder


REFINED = {"bits": 5, "refine": True, "include": MATRICES, "baseline": False}


def test_a_model_that_cannot_run_cannot_be_refined(tmp_path, source):
    folder = _with_config(source, tmp_path / "source", model_type="no_such_model")
    with pytest.raises(UnsupportedEnvironmentError, match="no_such_model"):
        api.convert(folder, tmp_path / "out", **REFINED)
    assert not (tmp_path / "out").exists()


def test_a_config_of_a_larger_model_is_refused_before_its_weights_are_made_up(tmp_path, source):
    """Without sizes transformers takes its defaults: seven billion weights, drawn at random."""
    folder = _with_config(
        source, tmp_path / "source", model_type="llama", architectures=["LlamaForCausalLM"]
    )
    with pytest.raises(UnsupportedEnvironmentError, match="larger model: parameters"):
        api.convert(folder, tmp_path / "out", **REFINED)
    assert not (tmp_path / "out").exists()


def test_a_model_larger_than_memory_is_not_refined_and_that_is_said(source, monkeypatch):
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    monkeypatch.setattr(calibration, "free_memory", lambda device: size)
    with SourceModel(source) as opened:
        found = calibrate(opened, "random", refined={"model.layers.0.mlp.up_proj.weight"})
    assert found.products is None
    assert any("no refinement" in note for note in found.notes)


@pytest.fixture
def other_device(monkeypatch):
    """Has the calibration take `OTHER` for a CUDA device that this machine need not have."""
    found = {"cpu": CPU, "cuda": torch.device("cuda", 0), "cuda:0": OTHER}
    monkeypatch.setattr(places, "device_of", found.__getitem__)
    monkeypatch.setattr(calibration, "device_of", {**found, "cuda": OTHER}.__getitem__)


def test_a_device_gives_the_rate_and_the_figures_of_the_cpu(tmp_path, source, other_device):
    asked = {"bits": 4, "refine": True, "include": MATRICES, "baseline": True}
    done = {
        device: api.convert(source, tmp_path / device, device=device, **asked)
        for device in ("cpu", "cuda")
    }
    assert [converted.baseline.kind for converted in done.values()] == ["greedy", "greedy"]
    reports = {device: converted.report for device, converted in done.items()}
    assert [report.quantized_bits_per_weight for report in reports.values()] == pytest.approx(
        [4, 4], rel=0.005
    )
    manifests = [report.manifest for report in reports.values()]
    assert manifests[0].calibration == manifests[1].calibration
    assert [record.rounding for record in manifests[0].tensors if record.scheme == "int8"] == [
        record.rounding for record in manifests[1].tensors if record.scheme == "int8"
    ]


@pytest.mark.parametrize("room", ["for all", "for no sums", "for no model"])
def test_sums_lie_on_the_device_where_they_fit(source, monkeypatch, other_device, room):
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    free = {"for all": 1 << 40, "for no sums": 4 * size, "for no model": 0}[room]
    monkeypatch.setattr(
        calibration, "free_memory", lambda device: free if device is OTHER else 1 << 40
    )
    name = "model.layers.0.mlp.up_proj.weight"
    with SourceModel(source) as opened:
        found = calibrate(opened, "random", refined={name}, device="cuda")
    assert isinstance(found.products, DeviceProducts) == (room == "for all")
    assert name in found.feedback() and isinstance(found.feedback(), DeviceFeedback)
    assert any("does not fit" in note for note in found.notes) == (room == "for no model")


@pytest.mark.parametrize("device", ["cuda:77", "cuda", "auto"])
def test_a_device_that_is_not_here_is_refused(tmp_path, source, device):
    asked = {"bits": 5, "include": MATRICES, "baseline": False, "device": device}
    if device == "auto":
        report = api.convert(source, tmp_path / "out", **asked).report
        assert report.quantized_bits_per_weight == pytest.approx(5, rel=0.005)
        return
    with pytest.raises(UnsupportedEnvironmentError, match="no such device here") as caught:
        api.convert(source, tmp_path / "out", **asked)
    assert device in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no such device"):
        api.convert(source, tmp_path / "out", **{**asked, "device": "tpu"})


def test_the_command_line_refines(tmp_path, source):
    include = [part for pattern in MATRICES for part in ("--include", pattern)]
    command = [
        "convert",
        str(source),
        str(tmp_path / "out"),
        "--no-baseline",
        "--bits",
        "5",
        "--refine",
        "--json",
        *include,
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["refine"] is True
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "out")])
    assert "refine True" in shown.output
