"""`codecllm eval`: figures equal a direct computation, and count all stored bits."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from codecllm.cli.checking import app
from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    ModelMismatchError,
    NotAContainerError,
    SourceError,
    UnsupportedEnvironmentError,
    UsageError,
)
from codecllm.formats.shards.side_tensors import side_names
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier.evaluation import evaluate, evaluate_tasks, sample_text
from codecllm.verifier.evaluation.candidates import STORED_BITS_NAME, find_candidate
from codecllm.verifier.evaluation.divergence import Base
from codecllm.verifier.evaluation.plot import check_plot
from tests import tampering
from tests.integration import tiny_models

TEXT = " ".join(f"t{(7 * number * number + number) % 500}" for number in range(150))


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A tiny model with a tokenizer of one token per word."""
    folder = tampering.copy_of(tiny("llama"), tmp_path_factory.mktemp("eval") / "base")
    tokenizer = Tokenizer(
        WordLevel({f"t{number}": number for number in range(512)}, unk_token="t0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "int8"
    convert(base, out, scheme="int8", include=("*",))
    return out


def _distributions(model, window):
    ids = torch.tensor([int(word[1:]) for word in TEXT.split()])
    parts = [ids[first : first + window] for first in range(0, len(ids), window)]
    with torch.inference_mode():
        return [
            torch.log_softmax(model(input_ids=part[None]).logits[0, :-1].double(), -1)
            for part in parts
        ], parts


def test_figures_are_those_of_a_direct_computation(base, converted):
    result = evaluate(base, [converted], text=TEXT, window=32)
    (score,) = result.scores
    p, parts = _distributions(load_plain(base, torch.float32), 32)
    q, _ = _distributions(from_pretrained(converted, dtype=torch.float32), 32)
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(p, q, strict=True)])
    assert result.tokens == len(kl) == 150 - 5
    assert score.mean_kl == pytest.approx(float(kl.mean()), rel=1e-6)
    assert score.kl_99 == pytest.approx(
        float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]), rel=1e-6
    )
    assert score.top1 == pytest.approx(float(same.double().mean()))
    for found, distributions in ((result.base_perplexity, p), (score.perplexity, q)):
        nll = torch.cat(
            [
                -d.gather(1, part[1:, None])[:, 0]
                for d, part in zip(distributions, parts, strict=True)
            ]
        )
        assert found == pytest.approx(float(nll.mean().exp()), rel=1e-6)
    assert 0 < score.mean_kl < 0.01


def test_every_window_begins_with_the_start_token_of_the_tokenizer(base, converted, tmp_path):
    folder = tampering.copy_of(base, tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="t511 $A", special_tokens=[("t511", 511)])
    tokenizer.save(str(folder / "tokenizer.json"))
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t511"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kinds))
    words = [int(word[1:]) for word in TEXT.split()]
    models = load_plain(base, torch.float32), from_pretrained(converted, dtype=torch.float32)
    kl = []
    for first in range(0, len(words), 31):
        ids = torch.tensor([[511, *words[first : first + 31]]])
        with torch.inference_mode():
            p, q = (
                torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
                for model in models
            )
        kl.append((p.exp() * (p - q)).sum(-1))
    result = evaluate(folder, [converted], text=TEXT, window=32)
    # Every word is predicted, because each window's first token is the start token.
    assert result.tokens == len(words)
    assert result.scores[0].mean_kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-6)


def test_a_model_beside_itself_and_its_lossless_container_is_no_distance(base, tmp_path):
    convert(base, tmp_path / "c", scheme="lossless")
    for score in evaluate(base, [base, tmp_path / "c"], text=TEXT, max_tokens=64).scores:
        assert (score.mean_kl, score.kl_99, score.top1) == (0, 0, 1)


def test_bits_count_everything_that_is_stored(base, converted):
    bits = find_candidate(converted).bits()
    files = [*converted.glob("*.safetensors"), converted / "codecllm.json"]
    assert bits.stored == 8 * sum(file.stat().st_size for file in files)
    plain = find_candidate(base).bits()
    assert plain.stored == 8 * (base / "model.safetensors").stat().st_size
    assert plain.weights == bits.weights == sum(p.numel() for p in load_plain(base).parameters())
    norms, vocabulary = 5 * 64, 512 * 64
    assert plain.layer_weights == bits.layer_weights == plain.weights - norms - vocabulary
    with Container(converted) as opened:
        header_bytes = len(opened.shard(0)[1].raw)
        payload = sum(
            opened.shard(0)[1].tensors[name].bytes
            for record in opened.manifest.tensors
            if ".layers." in record.name and len(record.shape) == 2
            for name in (record.name, *side_names(record))
        )
    described = header_bytes + (converted / "codecllm.json").stat().st_size
    assert payload + 0.7 * described < bits.layer_stored / 8 < payload + described


def test_a_dequantized_folder_has_the_bits_that_it_states(base, tmp_path):
    folder = tampering.copy_of(base, tmp_path / "dequantized")
    names = load_file(base / "model.safetensors").keys()
    stated = {name: 1000 if ".layers." in name else 500 for name in names}
    (folder / STORED_BITS_NAME).write_text(json.dumps(stated))
    found = find_candidate(folder)
    assert (found.kind, found.bits().stored) == ("dequantized", sum(stated.values()))
    assert found.bits().layer_stored == 1000 * sum(
        ".layers." in name and "norm" not in name for name in names
    )
    assert found.bits().weights == find_candidate(base).bits().weights
    for wrong in (
        {**stated, "more": 1},
        {**stated, next(iter(names)): "many"},
        [],
        {**stated, next(iter(names)): True},
    ):
        (folder / STORED_BITS_NAME).write_text(json.dumps(wrong))
        with pytest.raises(SourceError, match=r"stored_bits\.json"):
            found.bits()


def test_other_vocabularies_and_other_kinds_of_models_are_errors(base, tiny, tmp_path):
    source = tiny_models.save(
        tmp_path / "other",
        tiny_models.hf.LlamaForCausalLM(
            tiny_models.hf.LlamaConfig(**{**tiny_models.GROUPED, "vocab_size": 640})
        ),
    )
    with pytest.raises(ModelMismatchError, match="vocabularies differ"):
        evaluate(base, [source], text=TEXT)
    with pytest.raises(UsageError, match="no causal language model"):
        evaluate(tiny("bert"), [base])
    with pytest.raises(UsageError, match="tokenizer"):
        evaluate(tiny("llama_untied"), [base])


def test_usage_errors(base, tmp_path):
    with pytest.raises(UsageError, match="no candidate"):
        evaluate(base, [])
    with pytest.raises(UsageError, match="window"):
        evaluate(base, [base], window=1)
    with pytest.raises(UsageError, match="fewer than two tokens"):
        evaluate(base, [base], text="t1")
    with pytest.raises(UsageError, match="no such file"):
        evaluate(base, [tmp_path / "no.gguf"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither a container nor a model"):
        evaluate(base, [tmp_path / "empty"])
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotAContainerError, match="no GGUF file"):
        evaluate(base, [tmp_path / "bad.gguf"], text=TEXT)
    with pytest.raises(UsageError, match="a plot is written as"):
        check_plot(tmp_path / "plot.txt")


def test_the_built_in_text_is_long_enough_to_measure_on():
    assert len(sample_text().split()) > 1000
    assert sample_text().isascii()


def test_command(base, converted, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = [
        "eval",
        str(base),
        str(converted),
        str(base),
        "--text",
        str(tmp_path / "text.txt"),
        "--window",
        "50",
    ]
    app([*arguments, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert [score["kind"] for score in found["scores"]] == ["container", "folder"]
    assert found["tokens"] == 147
    app(arguments, standalone_mode=False)
    shown = capsys.readouterr().out
    assert f"{found['scores'][0]['mean_kl']:.3e}" in shown
    assert "KL in nats per token" in shown


def test_plot(base, converted, tmp_path):
    matplotlib = pytest.importorskip(
        "matplotlib", reason="plots are an extra: pip install codecllm[plot]"
    )
    from codecllm.verifier.evaluation.plot import draw

    result = evaluate(base, [converted, base], text=TEXT, max_tokens=40)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        draw(result, tmp_path / "kl.svg")
    drawn = (tmp_path / "kl.svg").read_text()
    for label in (
        "KL(base || candidate) per token, nats (39 tokens)",
        converted.name,
        f"{base.name} (0)",
        "container",
        "folder",
    ):
        assert f">{label}</text>" in drawn


def test_the_layers_of_the_base_run_once_for_all_candidates(base, converted):
    model, other = load_plain(base, torch.float32), from_pretrained(converted, dtype=torch.float32)
    runs = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    reading = Base(model, [int(word[1:]) for word in TEXT.split()], 32)
    assert reading.compare(other).kl == reading.compare(other).kl
    assert len(runs) == 5


def test_a_base_that_does_more_than_its_head_runs_whole_each_time(base, converted):
    class Capped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def get_output_embeddings(self):
            return self.model.lm_head

        def forward(self, **inputs):
            return SimpleNamespace(logits=5 * torch.tanh(self.model(**inputs).logits / 5))

    capped, other = (
        Capped(load_plain(base, torch.float32)),
        Capped(from_pretrained(converted, dtype=torch.float32)),
    )
    reading = Base(capped, [int(word[1:]) for word in TEXT.split()], 64)
    first, second = reading.compare(other), reading.compare(other)
    assert first.kl == second.kl
    assert first.base_nll == second.base_nll


# --- Tasks; tests/tasks has those that need the harness


def test_tasks_without_the_extra_are_one_error(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnsupportedEnvironmentError, match=r"pip install 'codecllm\[eval\]'"):
        evaluate_tasks(base, [], ["hellaswag"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "hellaswag", "--plot", "a.svg"], "--tasks takes no --text"),
        (["--limit", "3"], "--limit is of --tasks"),
        (["--tasks", " , "], "no task was given"),
        (["--device", "nowhere"], "no such kind of device"),
        (["--device", "cuda:99"], "no such device here"),
    ],
)
def test_options_that_do_not_fit_are_errors(base, arguments, message):
    result = CliRunner().invoke(app, ["eval", str(base), str(base), *arguments])
    assert isinstance(result.exception, CodecLLMError)
    assert message in str(result.exception)
