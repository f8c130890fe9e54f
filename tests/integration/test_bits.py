from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

import codecllm
from codecllm import api
from codecllm.calibrator import calibrate
from codecllm.calibrator.gradients import squared_gradients
from codecllm.cli.app import app
from codecllm.converter import ConvertOptions, convert, estimate
from codecllm.converter.rate import Target, fit
from codecllm.converter.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.quality import QUALITIES, chosen_steps
from tests.integration import tiny_models

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024}
MATRICES = ("*_proj.weight", "*embed_tokens*", "*.dense.weight", "*.c_*.weight", "*query.weight")


def _moe():
    config = hf.Qwen3MoeConfig(**{**tiny_models.EXPERTS, **WIDE, "moe_intermediate_size": 128}, num_experts=4, head_dim=32)
    return hf.Qwen3MoeForCausalLM(config)


def _bert():
    return hf.BertModel(hf.BertConfig(**{**tiny_models.COMMON, **WIDE}))


def _gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=64, **tiny_models.TEXT_ONLY))


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


# Of the encoder's 344,064 weights in 39 tensors a fifth of the size is header and manifest, which the search only estimates.
@pytest.mark.parametrize(
    ("name", "kind", "within"), [("moe", "self", 0.005), ("bert", "random", 0.02), ("gpt2", "self", 0.005)]
)
def test_a_container_has_the_bits_that_were_asked_for_and_names_its_text(tmp_path, source, name, kind, within):
    done = api.convert(source(name), tmp_path / "out", bits=5, include=MATRICES, baseline=False)
    assert done.report.quantized_bits_per_weight == pytest.approx(5, rel=within)
    manifest = done.report.manifest
    assert manifest.options.bits == 5
    assert (manifest.options.calibrate, manifest.calibration.kind) == ("self", kind)
    assert manifest.calibration.tokens == 16 * (62 if kind == "random" else 61)
    assert codecllm.verify(tmp_path / "out", source=source(name), baseline=False).ok


def test_every_expert_has_statistics_of_its_own(source):
    found = calibrate(source("moe"), "random").statistics
    with SourceModel(source("moe")) as model:
        experts = [name for name in model.tensors if ".experts." in name]
        assert experts
        for name in experts:
            assert (len(found[name].rows), len(found[name].cols)) == model.tensors[name].shape
    first, second = (found[f"model.layers.0.mlp.experts.{number}.up_proj.weight"].rows for number in (0, 1))
    assert not (first == second).all()


def test_sums_of_rows_and_columns_are_those_of_the_squared_gradients():
    model = torch.nn.Linear(3, 2, bias=False)
    model.config = hf.PretrainedConfig()
    tokens = torch.tensor([[0, 1], [2, 1]])
    inputs = torch.eye(3)

    class Output:
        def __init__(self, hidden):
            self.last_hidden_state = hidden

    model.forward = lambda input_ids: Output(torch.nn.functional.linear(inputs[input_ids], model.weight))
    sums = squared_gradients(type("Model", (), {
        "named_parameters": lambda self: iter([("weight", model.weight)]),
        "parameters": lambda self: iter([model.weight]),
        "config": model.config,
        "device": torch.device("cpu"),
        "__call__": lambda self, input_ids: model.forward(input_ids),
    })(), tokens)  # fmt: skip
    rows, cols = sums["weight"]
    # Each token's one-hot input meets signs of square 1 in both outputs: column j counts its tokens.
    assert rows.tolist() == [4.0, 4.0]
    assert cols.tolist() == [2.0, 4.0, 2.0]


def test_the_bytes_do_not_depend_on_workers(tmp_path, source):
    statistics = calibrate(source("moe"), "random").statistics
    results = []
    for workers in (1, 4):
        options = {"include": MATRICES, "workers": workers}
        steps = fit(source("moe"), ConvertOptions(**options), Target(bits=4.5), statistics)
        convert(source("moe"), tmp_path / str(workers), steps=steps, **options)
        results.append({path.name: path.read_bytes() for path in (tmp_path / str(workers)).iterdir()})
    assert results[0] == results[1]


def test_two_calibrations_are_alike(source):
    first, second = (calibrate(source("bert"), "random") for _ in range(2))
    assert first.record == second.record
    name = next(iter(first.statistics))
    assert (first.statistics[name].rows == second.statistics[name].rows).all()


def test_a_text_that_is_of_no_use_is_refused(tmp_path, source):
    with pytest.raises(UsageError, match="too short"):
        calibrate(source("moe"), str(_written(tmp_path / "text", "some words")))
    with pytest.raises(UsageError, match="cannot be read"):
        calibrate(source("moe"), str(tmp_path / "absent"))


def test_a_dry_run_predicts(source):
    options = {"include": MATRICES}
    more, _ = chosen_steps(source("gpt2"), options, bits=None, ratio=2.5, quality=None, calibrate="none")
    predicted = estimate(source("gpt2"), ConvertOptions(**options, **more))
    assert predicted.source_bytes / predicted.stored_bytes == pytest.approx(2.5, rel=0.02)


def test_a_ratio_is_reached(tmp_path, source):
    report = api.convert(source("gpt2"), tmp_path / "out", ratio=2.5, calibrate="none", include=MATRICES, baseline=False).report
    assert report.ratio == pytest.approx(2.5, rel=0.01)
    assert report.manifest.options.ratio == 2.5
    assert report.manifest.calibration is None


def test_what_cannot_run_is_converted_uncalibrated_with_a_line_that_says_so(tmp_path, source):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in source("gpt2").iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text('{"model_type": "gpt2", "architectures": ["NoSuchModel"]}')
    report = api.convert(folder, tmp_path / "out", bits=6, include=MATRICES, baseline=False).report
    assert report.manifest.options.calibrate == "none"
    assert any("not calibrated" in warning and "NoSuchModel" in warning for warning in report.warnings)
    with pytest.raises(UnsupportedEnvironmentError, match="NoSuchModel"):
        api.convert(folder, tmp_path / "other", bits=6, calibrate="self", include=MATRICES, baseline=False)
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
        ({"quality": "best"}, "no such quality"),
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
    command = ["convert", str(source("gpt2")), str(tmp_path / "out"), "--no-baseline", "--calibrate", "none", *include]
    done = run([*command, "--quality", "high"])
    assert done.exit_code == 0, done.output
    with Container(tmp_path / "out") as container:
        assert container.manifest.options.bits == QUALITIES["high"]


def _written(path, text):
    path.write_text(text)
    return path
