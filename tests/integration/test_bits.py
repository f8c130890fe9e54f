"""`convert --bits` and `--ratio`: the promised size, from statistics of the right gradients."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from typer.testing import CliRunner

import codecllm
from codecllm import api
from codecllm.calibrator import calibrate as calibrate_model
from codecllm.calibrator import calibration
from codecllm.calibrator.activations import mean_squared_inputs
from codecllm.calibrator.gradients import _projected, squared_gradients
from codecllm.calibrator.text import random_text
from codecllm.cli import checking, converting, reading  # noqa: F401 - they register commands
from codecllm.cli.app import app
from codecllm.converter import ConvertOptions, ParamsChoice, Rate, convert
from codecllm.converter.options import QUALITIES
from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.resident.int8_form import Int8Form
from tests.integration import architectures, tiny_models
from tests.integration.outputs import coded_weights, in_experts_loop, logits, same_bits
from tests.stepped import fitted

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024}
MATRICES = ("*_proj.weight", "*embed_tokens*", "*.dense.weight", "*.c_*.weight", "*query.weight")


def _moe():
    config = hf.Qwen3MoeConfig(
        **{**tiny_models.EXPERTS, **WIDE, "moe_intermediate_size": 128}, num_experts=4, head_dim=32
    )
    return hf.Qwen3MoeForCausalLM(config)


def _bert():
    return hf.BertModel(hf.BertConfig(**{**tiny_models.COMMON, **WIDE}))


def _gpt2():
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=64, **tiny_models.TEXT_ONLY)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of a small model by name."""
    made = {}

    def get(name):
        if name not in made:
            build = {"moe": _moe, "bert": _bert, "gpt2": _gpt2}[name]
            made[name] = tiny_models.save(tmp_path_factory.mktemp("bits") / name, build())
        return made[name]

    return get


def calibrate(folder, kind, on_stage=None):
    """Calibrates a folder."""
    with SourceModel(folder) as opened:
        return calibrate_model(opened, kind, on_stage)


# Of the encoder's 344,064 weights in 39 tensors a fifth of the size is header and manifest.
@pytest.mark.parametrize(("name", "kind"), [("moe", "self"), ("bert", "random"), ("gpt2", "self")])
def test_a_container_has_the_bits_that_were_asked_for_and_names_its_text(
    tmp_path, source, name, kind
):
    done = api.convert(source(name), tmp_path / "out", bits=5, include=MATRICES, baseline=False)
    assert done.report.quantized_bits_per_weight == pytest.approx(5, rel=0.005)
    manifest = done.report.manifest
    assert manifest.options.bits == 5
    assert (manifest.options.calibrate, manifest.calibration.kind) == ("text", kind)
    assert manifest.calibration.tokens == 64 * (62 if kind == "random" else 61)
    assert codecllm.verify(tmp_path / "out", source=source(name), baseline=False).ok


def test_low_rates_verify_against_their_source_and_say_how_codes_were_rounded(tmp_path, source):
    done = api.convert(
        source("gpt2"),
        tmp_path / "out",
        bits=3.5,
        calibrate="none",
        include=MATRICES,
        baseline=False,
    )
    rounded = [
        record.rounding for record in done.report.manifest.tensors if record.scheme == "int8"
    ]
    assert rounded and set(rounded) == {"deadzone"}
    assert done.report.quantized_bits_per_weight == pytest.approx(3.5, rel=0.005)
    report = codecllm.verify(tmp_path / "out", source=source("gpt2"), baseline=False)
    assert report.ok
    assert f"{len(rounded)} rounded otherwise, as recorded (deadzone; worst 0.5" in report.to_json()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # The file's names lack the prefix that the model's have.
        ("opt_without_prefix", {"bits": 7.9}),
        # Of few inputs almost all codes of a query keep the products.
        ("bert", {"bits": 7.5, "calibrate": "random", "refine": True}),
    ],
)
def test_verify_accepts_tensors_that_the_output_hardly_needs(tmp_path, name, options):
    """Their share of the bits is small: most codes are zero."""
    source = architectures.make(name, tmp_path / "source")
    matrices = ("*proj*", "*dense*", "*fc*", "*query*")
    api.convert(source, tmp_path / "out", include=matrices, **options)
    report = codecllm.verify(tmp_path / "out", source=source)
    assert report.ok, report.to_json()
    errors = [
        tensor["relative_error"]
        for tensor in codecllm.compare_models(source, tmp_path / "out", run=False)["tensors"]
        if tensor["relative_error"] is not None
    ]
    assert 0.9 < max(errors) < 1.5


@pytest.mark.parametrize(("bits", "accepted"), [(3.0, True), (8.0, False)])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_verify_has_the_floor_of_a_baseline(tmp_path, source, monkeypatch, bits, accepted, name):
    """An output far from the source's is no fault of a container with few bits."""
    done = api.convert(
        source(name),
        tmp_path / "out",
        bits=bits,
        calibrate="none",
        include=MATRICES,
        baseline=False,
    )
    assert done.report is not None
    monkeypatch.setattr("codecllm.verifier.diagnosis.model.text.kl_per_position", _far)
    cosine = torch.nn.functional.cosine_similarity
    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", lambda *a: cosine(*a) * 0.5)
    monkeypatch.setattr(torch.Tensor, "argmax", _random_argmax)
    report = codecllm.verify(tmp_path / "out", source=source(name), baseline=False)
    faults = [str(finding.error) for finding in report.stage("model").findings]
    assert bool(faults) != accepted, faults


def _far(expected, got):
    return torch.full(expected.shape[:1], 2.0)


def _random_argmax(self, *args, _original=torch.Tensor.argmax, **kwargs):
    best = _original(self, *args, **kwargs)
    return torch.randint_like(best, 1 << 30) if best.dim() == 1 else best


def test_every_expert_has_statistics_of_its_own(source):
    found = calibrate(source("moe"), "random").statistics
    with SourceModel(source("moe")) as model:
        experts = [name for name in model.tensors if ".experts." in name]
        assert experts
        for name in experts:
            assert (len(found[name].rows), len(found[name].cols)) == model.tensors[name].shape
    first, second = (
        found[f"model.layers.0.mlp.experts.{number}.up_proj.weight"].rows for number in (0, 1)
    )
    assert not (first == second).all()


class Encoder(torch.nn.Module):
    """Embedding, linear layer and a plain matrix, each a multiple of the identity or of ones."""

    def __init__(self):
        super().__init__()
        self.config, self.device = hf.PretrainedConfig(), torch.device("cpu")
        self.words, self.layer = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 3)
        self.mixer, self.idle = torch.nn.Parameter(2 * torch.eye(3)), torch.nn.Linear(3, 3)
        with torch.no_grad():
            self.words.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 1]]))
            self.layer.weight.copy_(5 * torch.eye(3))
            self.layer.bias.zero_()

    def forward(self, input_ids):
        return BaseModelOutput(last_hidden_state=self.layer(self.words(input_ids)) @ self.mixer)


def test_sums_of_rows_and_columns_are_those_of_each_tokens_squared_gradient():
    seen = []
    tokens = torch.tensor([[0, 1], [2, 1], [0, 0], [3, 3], [1, 0]])
    sums = squared_gradients(Encoder(), tokens, lambda *done: seen.append(done))
    assert seen[-1] == (5, 5)
    assert sums.keys() == {"words.weight", "layer.weight", "mixer"}
    # Signs have square 1. The mixer doubles them on their way back, the layer makes 10 of 2.
    counts = torch.tensor([4.0, 3, 1, 2])
    assert sums["words.weight"][0].tolist() == (counts * 3 * 100).tolist()
    assert sums["words.weight"][1].tolist() == [1000, 1000, 1000]
    squares = torch.tensor([[1.0, 0, 0], [0, 4, 0], [0, 0, 9], [1, 1, 1]])
    entering = counts @ squares
    assert sums["layer.weight"][0].tolist() == [4 * float(entering.sum())] * 3
    assert sums["layer.weight"][1].tolist() == (4 * 3 * entering).tolist()
    # Of the mixer the gradients of some sequences are squared, sums over tokens that meet other
    # signs.
    rows, cols = sums["mixer"]
    assert rows.sum() == pytest.approx(float(cols.sum())) and bool((rows > 0).all())


def test_a_tied_weight_has_the_sums_of_both_its_uses():
    config = hf.LlamaConfig(**tiny_models.GROUPED, tie_word_embeddings=False)
    apart = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        apart.lm_head.weight.copy_(apart.model.embed_tokens.weight)
    tied = hf.LlamaForCausalLM(
        hf.LlamaConfig(**tiny_models.GROUPED, tie_word_embeddings=True)
    ).eval()
    tied.load_state_dict(
        {name: value for name, value in apart.state_dict().items() if name != "lm_head.weight"},
        strict=False,
    )
    tokens = torch.arange(24).reshape(3, 8) % config.vocab_size
    found, both = squared_gradients(tied, tokens), squared_gradients(apart, tokens)
    assert (
        found.keys()
        == both.keys() - {"lm_head.weight"}
        == {n for n, p in tied.named_parameters() if p.ndim > 1}
    )
    for part in (0, 1):
        together = both["model.embed_tokens.weight"][part] + both["lm_head.weight"][part]
        assert torch.allclose(found["model.embed_tokens.weight"][part], together, rtol=1e-4)
        assert torch.allclose(
            found["model.layers.1.mlp.up_proj.weight"][part],
            both["model.layers.1.mlp.up_proj.weight"][part],
        )
    assert not any(parameter.requires_grad for parameter in tied.parameters())


def test_a_weight_tied_to_a_module_of_another_kind_keeps_both_its_uses():
    sizes = {**tiny_models.GROUPED, "head_dim": 16, "tie_word_embeddings": True}
    model = hf.GemmaForCausalLM(hf.GemmaConfig(**sizes)).eval()
    assert type(model.get_input_embeddings()) is not torch.nn.Embedding
    rows, _ = squared_gradients(model, torch.arange(1, 9)[None])["model.embed_tokens.weight"]
    assert bool((rows[1:9] > 10 * rows[9:].mean()).all())


def test_gradients_at_the_logits_have_the_covariance_of_the_models_own_labels():
    logits = torch.tensor([1.0, 0.0, -1.0]).repeat(20000, 1)[None].requires_grad_(True)
    _projected(CausalLMOutput(logits=logits), torch.Generator().manual_seed(0)).backward()
    found = logits.grad[0].T @ logits.grad[0] / 20000
    chances = torch.softmax(logits[0, 0].detach(), -1)
    assert torch.allclose(found, torch.diag(chances) - torch.outer(chances, chances), atol=0.005)
    assert torch.allclose(logits.grad[0].sum(-1), torch.zeros(20000), atol=1e-6)


def test_the_bytes_do_not_depend_on_workers(tmp_path, source):
    statistics = calibrate(source("moe"), "random").statistics
    results = []
    for workers in (1, 4):
        options = {"include": MATRICES, "workers": workers}
        steps = fitted(source("moe"), 4.5, statistics, **options)
        convert(source("moe"), tmp_path / str(workers), choice=ParamsChoice(steps), **options)
        results.append(
            {path.name: path.read_bytes() for path in (tmp_path / str(workers)).iterdir()}
        )
    assert results[0] == results[1]


@contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype
        torch.set_default_dtype(before)


SETTINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: _default_dtype(torch.float64),
    "float16": lambda: _default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def usual(source, tmp_path_factory):
    """The files of a conversion under no settings of the caller."""
    out = tmp_path_factory.mktemp("usual") / "out"
    codecllm.convert(source("gpt2"), out, bits=4.5, baseline=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_bytes_do_not_depend_on_settings_of_the_caller(tmp_path, source, usual, setting):
    with SETTINGS[setting]():
        codecllm.convert(source("gpt2"), tmp_path / "other", bits=4.5, baseline=True)
    for name, data in usual.items():
        assert data == (tmp_path / "other" / name).read_bytes(), name


def test_two_calibrations_are_alike(source):
    first, second = (calibrate(source("bert"), "random") for _ in range(2))
    assert first.record == second.record
    name = next(iter(first.statistics))
    assert (first.statistics[name].rows == second.statistics[name].rows).all()


def test_a_model_larger_than_memory_is_watched_layer_by_layer_from_disk(monkeypatch, source):
    size = sum(path.stat().st_size for path in source("moe").glob("*.safetensors"))
    monkeypatch.setattr(calibration, "free_memory", lambda device: size)
    told = []
    found = calibrate(source("moe"), "self", told.append)
    assert "layer by layer from disk" in told[0] and found.record.kind == "random"
    with SourceModel(source("moe")) as opened:
        known = set(opened.tensors)
    model = load_plain(source("moe"))
    tokens = random_text(model)[:16]
    whole = mean_squared_inputs(model, tokens, known)
    assert (
        "model.layers.1.self_attn.o_proj.weight" in whole
        and found.statistics.keys() == whole.keys()
    )
    assert found.record.tokens == tokens.numel()
    assert all(
        np.allclose(found.statistics[name].cols, whole[name].cols, rtol=1e-3) for name in whole
    )


def test_a_text_that_is_of_no_use_is_refused(tmp_path, source):
    with pytest.raises(UsageError, match="too short"):
        calibrate(source("moe"), str(_written(tmp_path / "text", "some words")))
    with pytest.raises(UsageError, match="cannot be read"):
        calibrate(source("moe"), str(tmp_path / "absent"))


def test_a_dry_run_predicts(source):
    options = ConvertOptions(include=MATRICES, rate=Rate(ratio=2.5, calibrate="none"))
    predicted = api.predict(source("gpt2"), options)
    assert predicted.source_bytes / predicted.stored_bytes == pytest.approx(2.5, rel=0.02)


def test_a_ratio_is_reached(tmp_path, source):
    report = api.convert(
        source("gpt2"),
        tmp_path / "out",
        ratio=2.5,
        calibrate="none",
        include=MATRICES,
        baseline=False,
    ).report
    assert report.ratio == pytest.approx(2.5, rel=0.01)
    assert report.manifest.options.ratio == 2.5
    assert report.manifest.calibration is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"model_type": "no_such_model"}, "no_such_model"), ({"model_type": "gpt2"}, "larger model")],
)
def test_what_cannot_run_is_converted_uncalibrated_with_a_line_that_says_so(
    tmp_path, source, config, reason
):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source("gpt2").iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    report = api.convert(folder, tmp_path / "out", bits=6, include=MATRICES, baseline=False).report
    assert report.manifest.options.calibrate == "none"
    assert any("not calibrated" in warning and reason in warning for warning in report.warnings)
    with pytest.raises(UnsupportedEnvironmentError, match=reason):
        api.convert(
            folder, tmp_path / "other", bits=6, calibrate="self", include=MATRICES, baseline=False
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 5, "scheme": "lossless"}, "scheme int8"),
        ({"bits": 1.5}, "2 to 8"),
        ({"bits": 9}, "2 to 8"),
        ({"bits": 5, "ratio": 3}, "exclude one another"),
        ({"bits": 5, "calibrate": "no-such-file"}, "no such calibration"),
        ({"calibrate": "self"}, "calibrate needs bits"),
        ({"bits": 5, "code_bits": 4}, "exclude one another: give one, got .*code_bits 4"),
        ({"code_bits": 1}, "not a value of code_bits, got 1, expected 2 to 8"),
        ({"code_bits": 9}, "not a value of code_bits, got 9, expected 2 to 8"),
        ({"code_bits": 4, "calibrate": "text"}, "a calibration only refines, got calibrate text"),
        ({"code_bits": 4, "column_scales": False}, "no scales of columns in any case"),
        ({"code_bits": 4, "scheme": "lossless"}, "scheme int8"),
        ({"column_scales": False}, "no column scales: that needs bits"),
        ({"quality": "best"}, "not a value of quality, got 'best'"),
        ({"ratio": 40, "calibrate": "none"}, "out of reach"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, source, asked, message):
    with pytest.raises(UsageError, match=message):
        api.convert(source("gpt2"), tmp_path / "out", include=MATRICES, baseline=False, **asked)
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_a_quality(tmp_path, source):
    run = partial(CliRunner().invoke, app)
    include = [part for pattern in MATRICES for part in ("--include", pattern)]
    command = [
        "convert",
        str(source("gpt2")),
        str(tmp_path / "out"),
        "--no-baseline",
        "--calibrate",
        "none",
        *include,
    ]
    done = run([*command, "--quality", "high"])
    assert done.exit_code == 0, done.output
    with Container(tmp_path / "out") as container:
        assert container.manifest.options.bits == QUALITIES["high"]


def _written(path, text):
    path.write_text(text)
    return path


def test_int8_residency_keeps_codes_beyond_8_bits_apart(tmp_path, source):
    folder = shutil.copytree(source("moe"), tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[::997] *= 12  # the tails that trained weights have
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = api.convert(
        folder,
        tmp_path / "c",
        bits=7.2,
        calibrate="none",
        include=MATRICES,
        baseline=False,
    )
    assert any(getattr(record, "wide", False) for record in done.report.manifest.tensors)
    dense = in_experts_loop(from_pretrained(tmp_path / "c", resident="dense"))
    resident = from_pretrained(tmp_path / "c", resident="int8")
    coded = coded_weights(resident)
    matrices = [weight.form for weight in coded.values() if isinstance(weight.form, Int8Form)]
    assert any(form.matrix.escapes is not None for form in matrices)
    for name, weight in coded.items():
        assert same_bits(weight, dense.get_parameter(name))
    few, expected = logits(resident), logits(dense)
    assert (few - expected).norm() <= 0.02 * expected.norm()
    assert resident.get_memory_footprint() < 0.8 * dense.get_memory_footprint()
