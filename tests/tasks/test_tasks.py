"""`codecllm eval --tasks`: accuracies and agreement equal a direct computation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from codecllm.cli.checking import app
from codecllm.converter import convert
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.loader import from_pretrained
from codecllm.loader.hf.folder import read_tokenizer
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier.evaluation import evaluate_tasks
from codecllm.verifier.evaluation.candidates import find_candidate
from tests import tampering
from tests.integration import tiny_models

pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed; `make test-eval` has an environment for it"
)

pytestmark = pytest.mark.filterwarnings("default")  # those of the harness and its data sets

FILE = Path(__file__).parent / "sentences.yaml"
ROWS = [json.loads(line) for line in FILE.with_suffix(".jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with a tokenizer of bytes."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**tiny_models.GROUPED))
    folder = tiny_models.save(tmp_path_factory.mktemp("tasks") / "base", model)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*alphabet, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks") / "int8"
    convert(base, out, scheme="int8", include=("*",))
    return out


def _choices(model, tokenizer, rows):
    """The end of each sentence that a model finds likeliest, one sequence at a time."""
    chosen = []
    for row in rows:
        likelihoods = []
        for end in row["ends"]:
            first = tokenizer(row["sentence"])["input_ids"]
            ids = torch.tensor([first + tokenizer(" " + end)["input_ids"]])
            with torch.inference_mode():
                found = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
            each = found.gather(1, ids[0, 1:, None])[:, 0]
            likelihoods.append(float(each[len(first) - 1 :].sum()))
        chosen.append(likelihoods.index(max(likelihoods)))
    return chosen


@pytest.mark.parametrize(("limit", "batch_size"), [(None, 8), (10, 3)])
def test_accuracy_and_agreement_are_those_of_the_likeliest_ends(base, converted, limit, batch_size):
    rows = ROWS[:limit]
    tokenizer = read_tokenizer(base)
    ours, theirs = (
        _choices(model.eval(), tokenizer, rows)
        for model in (
            load_plain(base, torch.float32),
            from_pretrained(converted, dtype=torch.float32),
        )
    )
    result = evaluate_tasks(base, [converted], [str(FILE)], limit=limit, batch_size=batch_size)
    assert [(score.model, score.task, score.metric) for score in result.scores] == [
        (str(base), "sentences", "acc"),
        (str(converted), "sentences", "acc"),
    ]
    fitting = [row["fitting"] for row in rows]
    for score, chosen in zip(result.scores, (ours, theirs), strict=True):
        hits = [a == b for a, b in zip(chosen, fitting, strict=True)]
        share = sum(hits) / len(hits)
        assert score.value == pytest.approx(share)
        # The standard error of a mean, with the spread of a sample.
        assert score.stderr == pytest.approx((share * (1 - share) / (len(hits) - 1)) ** 0.5)
        assert score.examples == len(rows)
        same = sum(a == b for a, b in zip(chosen, ours, strict=True))
        assert score.agreement == pytest.approx(same / len(rows))
        assert score.bits_per_weight == find_candidate(score.model).bits().per_weight


def test_a_model_that_answers_otherwise_agrees_less(base, tmp_path):
    """The last layer's norm turned over: other ends are the likeliest."""
    from safetensors.torch import load_file, save_file

    other = tampering.copy_of(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= -1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    scores = evaluate_tasks(base, [base, other], [str(FILE)]).scores
    assert scores[0].agreement == scores[1].agreement == 1
    assert scores[2].agreement < 0.9


def test_texts_and_greedy_continuations_are_answers_too(base, converted, tmp_path):
    shutil.copy(FILE.with_suffix(".jsonl"), tmp_path)
    text = FILE.read_text().replace("task: sentences", "task: written")
    text = text.replace('doc_to_choice: "{{ends}}"\n', "")
    text = text.replace("doc_to_target: fitting", 'doc_to_target: " {{ends[fitting]}}"')
    written = text.replace("multiple_choice", "generate_until").replace("acc", "exact_match")
    written += "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
    (tmp_path / "written.yaml").write_text(written)
    exact = text.replace("multiple_choice", "loglikelihood").replace("written", "exact")
    (tmp_path / "exact.yaml").write_text(exact)
    files = [str(tmp_path / name) for name in ("written.yaml", "exact.yaml")]
    scores = evaluate_tasks(base, [base, converted], files, limit=4).scores
    assert [(score.task, score.agreement) for score in scores if score.model == str(base)] == [
        ("exact", 1),
        ("exact", 1),
        ("written", 1),
        ("written", 1),
    ]
    assert {score.metric for score in scores} == {"acc", "exact_match"}


def test_the_command_prints_a_table_or_json(base, converted):
    arguments = ["eval", str(base), str(converted), "--tasks", str(FILE), "--limit", "6"]
    printed = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert printed.exit_code == 0
    assert "same answers" in printed.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["limit"] == 6
    assert [score["examples"] for score in found["scores"]] == [6, 6]


def test_one_model_is_scored_alone(converted, base, tmp_path):
    shutil.copytree(converted, tmp_path / "alone")
    (score,) = evaluate_tasks(tmp_path / "alone", [], [str(FILE)], limit=4).scores
    assert (score.kind, score.agreement) == ("container", 1)


def test_no_such_task_or_file(base, tmp_path):
    with pytest.raises(UsageError, match="no such task, got 'no_such_task_at_all'"):
        evaluate_tasks(base, [], ["no_such_task_at_all"])
    with pytest.raises(UsageError, match="no such task file"):
        evaluate_tasks(base, [], [str(tmp_path / "absent.yaml")])
    for text, message in (
        ("task: [", "cannot be read"),
        ("output_type: multiple_choice", "no name of one task"),
        ("- a list", "cannot be read"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            evaluate_tasks(base, [], [str(tmp_path / "bad.yaml")])


def test_data_that_is_missing_or_does_not_fit_is_one_error(base, tmp_path):
    (tmp_path / "lost.yaml").write_text(FILE.read_text().replace("sentences.jsonl", "lost.jsonl"))
    with pytest.raises(UnsupportedEnvironmentError, match="a task cannot be loaded"):
        evaluate_tasks(base, [], [str(tmp_path / "lost.yaml")])
    shutil.copy(FILE.with_suffix(".jsonl"), tmp_path)
    (tmp_path / "other.yaml").write_text(FILE.read_text().replace("{{ends}}", "{{no.such.field}}"))
    with pytest.raises(UnsupportedEnvironmentError, match=r"a task (cannot be loaded|failed)"):
        evaluate_tasks(base, [], [str(tmp_path / "other.yaml")])
