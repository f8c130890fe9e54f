"""The comparison with EXL3: its order of work, its figures, and what it survives. No GPU."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.others import exl3
from benchmarks.quality.blockwise import quantized_layers
from benchmarks.quality.exl3 import DEFAULT, REFINED, SAME_TEXT, Comparison, tables
from benchmarks.quality.scores import bits_at, curve, kl_at
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier.evaluation import evaluate
from tests.integration import tiny_models

WORDS = 512


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with widths of 128 and a tokenizer of one token per word."""
    folder = tmp_path_factory.mktemp("exl3") / "base"
    sizes = {**tiny_models.TEXT_ONLY, "hidden_size": 128, "intermediate_size": 256}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=False)
    tiny_models.save(folder, LlamaForCausalLM(config))
    tokenizer = Tokenizer(
        WordLevel({f"t{number}": number for number in range(WORDS)}, unk_token="t0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def _texts():
    return [
        " ".join(f"t{(7 * number * number + number + seed) % WORDS}" for number in range(20_000))
        for seed in range(3)
    ]


def _rounded(matrix, inputs, rate, number, sensitivity=None):
    """Stands for EXL3: plain rounding with a scale for each row."""
    step = matrix.abs().amax(1, keepdim=True) / (2 ** (rate - 1) - 0.5)
    return (matrix / step).round() * step, int(rate * matrix.numel()) + 16 * len(matrix)


def test_blocks_see_the_inputs_that_quantized_blocks_give(base):
    ids = torch.arange(96).reshape(3, 32)
    model, seen = load_plain(base, torch.float32).eval(), {}

    def quantize(matrix, inputs, number, sensitivity):
        seen.setdefault((number, matrix.shape), []).append((inputs, sensitivity))
        return _rounded(matrix, inputs, 3, number)

    found = {name: matrix for name, matrix, _ in quantized_layers(model, ids, quantize)}
    linear = [
        name + ".weight"
        for name, module in load_plain(base, torch.float32).model.named_modules(prefix="model")
        if isinstance(module, torch.nn.Linear)
    ]
    assert sorted(found) == sorted(linear)
    # The second block: what enters its projections when the first one alone is quantized.
    twin = load_plain(base, torch.float32).eval()
    with torch.no_grad():
        for name, matrix in found.items():
            assert torch.equal(model.get_parameter(name), matrix)
            if ".layers.0." in name:
                twin.get_parameter(name).copy_(matrix)
    entered = {}
    mlp = twin.model.layers[1].mlp
    mlp.gate_proj.register_forward_hook(lambda _, args, out: entered.update(x=args[0], gate=out))
    mlp.up_proj.register_forward_hook(lambda _, args, out: entered.update(up=out))
    with torch.no_grad():
        twin(input_ids=ids)
    (inputs, of_gate), (_, of_up) = seen[1, (256, 128)]
    rows = entered["x"].reshape(-1, 128)
    assert inputs.count == len(rows) == 96
    torch.testing.assert_close(inputs.products, rows.T @ rows, rtol=1e-4, atol=1e-4)
    # Sensitivities: energy of the change of the MLP's output, by differentiation.
    gate, up = (entered[name].reshape(-1, 256).double().requires_grad_() for name in ("gate", "up"))
    (torch.nn.functional.silu(gate) * up).sum().backward()
    energy = mlp.down_proj.weight.double().square().sum(0)
    for got, slope in ((of_gate, gate.grad), (of_up, up.grad)):
        torch.testing.assert_close(
            got, (slope.square().mean(0) * energy).float(), rtol=1e-3, atol=0
        )


def test_a_comparison_scores_all_candidates_and_goes_on_where_it_was(base, tmp_path, capfd):
    made = []

    def quantizer(matrix, inputs, rate, number, sensitivity=None):
        if rate == 3:
            raise RuntimeError("out of something")
        made.append(rate)
        return _rounded(matrix, inputs, rate, number)

    comparison = Comparison(base, tmp_path, (4.0, 3.0, 6.0), "cpu", 6, 64, 128, quantizer, _texts)
    comparison.run(more=(7.0,))
    captured = capfd.readouterr()
    assert "not made: RuntimeError: out of something" in captured.err
    texts = json.loads((tmp_path / "scores.json").read_text())
    names = {"exl3-4", "exl3-6"}
    names |= {f"{title}-{bits}" for title in (DEFAULT, REFINED) for bits in ("4.111", "6.111", "7")}
    names |= {f"{SAME_TEXT}-{bits}" for bits in ("4.111", "6.111")}
    for scores in texts.values():
        assert scores.keys() == names
        assert scores["exl3-6"]["mean_kl"] < scores["exl3-4"]["mean_kl"]
    run = evaluate(base, [tmp_path / "exl3-4"], max_tokens=128)
    assert texts["first"]["exl3-4"]["mean_kl"] == pytest.approx(run.scores[0].mean_kl, rel=1e-6)
    assert run.scores[0].layer_bits_per_weight == pytest.approx(4.111, abs=0.001)
    lines = tables(texts)
    assert captured.out.count("\n".join(lines)) == 1
    rows = [line for line in lines if line.startswith("| 4.11") and " x)" in line]
    assert len(rows) == 2 and all(row.count(" x)") == 3 for row in rows)
    made.clear()
    (tmp_path / "scores.json").unlink()
    comparison.run(more=())
    assert not made, "a candidate on disk was made again"
    assert json.loads((tmp_path / "scores.json").read_text())["first"].keys() >= {
        "exl3-4",
        "exl3-6",
    }


def test_exl3_gets_what_its_conversion_gives_it(monkeypatch):
    """The dictionaries are those of exllamav3 1.6.5; a call of another shape fails here."""
    calls = []

    def quantize_exl3(weight, H_data, quant_args, return_weight_q):
        assert weight.dtype == torch.float32 and weight.is_contiguous() and return_weight_q
        assert H_data["H"].shape == (weight.shape[0], weight.shape[0])
        assert {"count", "finalized", "device", "num_total", "inf_nan", "first_key"} <= set(H_data)
        assert quant_args["apply_out_scales"] is None and quant_args["mul1"] is True
        calls.append((id(H_data), quant_args))
        found = 2 * weight
        weight.zero_()  # it works in its argument's memory
        halves = torch.zeros(sum(found.shape), dtype=torch.float16)
        return found, 0.1, {"trellis": torch.zeros(10, dtype=torch.int16), "scales": halves}

    module = ModuleType("exllamav3.modules.quant.exl3_lib.quantize")
    module.quantize_exl3 = quantize_exl3
    parts = module.__name__.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    matrix = torch.randn(256, 128)
    kept = matrix.clone()
    inputs = exl3.Inputs(torch.eye(128), 5)
    found, bits = exl3.quantize(matrix, inputs, 3.0, 7, torch.ones(256))
    exl3.quantize(matrix, inputs, 2.5, 7)
    assert torch.equal(found, 2 * kept) and torch.equal(matrix, kept)
    assert bits == 16 * (10 + 256 + 128)
    (first, settings), (second, others) = calls
    assert first == second, "matrices with one input share EXL3's dictionary of it"
    assert type(settings["K"]) is int and others["K"] == 2.5 and settings["seed"] == 7
    assert torch.equal(settings["out_sensitivity"], torch.ones(256))
    assert "out_sensitivity" not in others
    with pytest.raises(ValueError, match=r"multiples of 128: got \(256, 64\) in block 3"):
        exl3.quantize(torch.zeros(256, 64), exl3.Inputs(torch.eye(64), 1), 3.0, 3)


def test_curves_are_read_in_log_kl():
    scores = {
        name: {"layer_bits_per_weight": bits, "mean_kl": kl}
        for name, bits, kl in (("a-4.1", 4.0, 0.01), ("a-2", 2.0, 1.0), ("a-b-3", 3.0, 0.5))
    }
    points = curve(scores, "a")
    assert points == [(2.0, 1.0), (4.0, 0.01)]
    assert kl_at(points, 3.0) == pytest.approx(0.1)
    assert kl_at(points, 4.015) == 0.01 and kl_at(points, 4.1) is None
    assert bits_at(points, 0.1) == pytest.approx(3.0)
    assert bits_at(points, 0.001) is None and bits_at([], 1.0) is None and kl_at([], 1.0) is None
