"""`codecllm bench`: real figures of each residency, and a reason where there are none."""

from __future__ import annotations

import json

import pytest

from codecllm.bench import BenchOptions, bench
from codecllm.converter import convert
from codecllm.formats.errors import FormatError, UsageError
from tests.cli.forks import run
from tests.integration import tiny_models
from tests.tampering import copy_of

SHORT = ("--prompt-tokens", "5", "--new-tokens", "4", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("bench")
    source = tiny_models.llama(base / "source")
    convert(source, base / "int8", scheme="int8", include=("*",))
    convert(source, base / "lossless", scheme="lossless")
    return base


def test_every_residency_and_the_source(made):
    done = run("bench", made / "int8", "--source", made / "source", *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == ["source", "dense", "int8", "compressed"]
    for row in rows.values():
        assert row["error"] is None
        assert row["tokens_per_second"] > 0
        assert row["first_token_seconds"] > 0
        assert row["load_seconds"] > 0
    assert rows["dense"]["weights_bytes"] == rows["source"]["weights_bytes"]
    assert rows["int8"]["weights_bytes"] < 0.7 * rows["dense"]["weights_bytes"]
    assert rows["source"]["same_tokens"] is True
    assert rows["compressed"]["same_tokens"] is rows["dense"]["same_tokens"]


def test_text_output_and_a_residency_that_is_impossible(made):
    arguments = ("--resident", "dense", "--resident", "int8", "--batch", "2")
    done = run("bench", made / "lossless", *arguments, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert "int8: resident='int8' needs int8 tensors" in done.stdout
    done = run("bench", made / "lossless", "--resident", "int8", *SHORT)
    assert done.returncode == 3
    assert "nothing could be measured" in done.stderr


def test_a_model_without_generation(tmp_path):
    source = tiny_models.MAKERS["bert"](tmp_path / "source")
    convert(source, tmp_path / "c", scheme="lossless")
    (row,) = bench(tmp_path / "c", BenchOptions(residents=("dense",)))
    assert row.error == "BertForSequenceClassification does not generate text"


@pytest.mark.parametrize(
    "options",
    [{"residents": ("fast",)}, {"new_tokens": 1}, {"prompt_tokens": 0}, {"batch": 0}],
)
def test_options_out_of_range(made, options):
    with pytest.raises(UsageError):
        list(bench(made / "int8", BenchOptions(**options)))


@pytest.mark.parametrize("name", ["codecllm.json", "model-00001-of-00001.safetensors"])
def test_a_damaged_container_is_one_error_before_anything_runs(made, tmp_path, name):
    copy = copy_of(made / "int8", tmp_path / "copy")
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(FormatError, match=name):
        next(bench(copy, BenchOptions()))
