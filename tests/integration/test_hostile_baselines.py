"""A record of outputs that is damaged or hostile: one finding, soon; no pass for nothing."""

from __future__ import annotations

import json
import time

import pytest

import codecllm
from codecllm.formats.errors import BaselineError, LimitError, SchemaError
from codecllm.verifier import verify
from codecllm.verifier.baseline.record import parse_baseline
from tests import tampering
from tests.malformed.measure import measured


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tiny):
    """Containers with a baseline: one that generates, and one that does not."""
    base = tmp_path_factory.mktemp("recorded")
    for name in ("llama", "bert"):
        codecllm.convert(tiny(name), base / name, include=("*",), baseline=True)
    return base


def _prompts(document, **changes):
    for prompt in document[document["kind"]]:
        prompt.update(changes)


def _tops(document, **changes):
    for prompt in document["greedy"]:
        for top in prompt["top"]:
            top.update(changes)


def _said(document, tokens, top):
    for prompt in document["greedy"]:
        prompt["converted"]["tokens"], prompt["top"] = tokens, top


def _many(document, count, tokens):
    prompt = {**document["greedy"][0], "tokens": tokens}
    document.update(batched=False, greedy=[prompt] * count)


REFUSED = {
    "no prompts": (lambda d: d.update(greedy=[]), SchemaError),
    "prompts of another kind": (lambda d: d.update(kind="hidden"), SchemaError),
    "prompts of no kind": (lambda d: d.update(kind="none"), SchemaError),
    "no environment": (lambda d: d.pop("environment"), SchemaError),
    "prompts without tokens": (lambda d: _prompts(d, tokens=[]), SchemaError),
    "nothing said": (lambda d: _said(d, [], []), SchemaError),
    "no probabilities": (lambda d: _prompts(d, top=[]), SchemaError),
    "no likely token": (lambda d: _tops(d, tokens=[], logprobs=[]), SchemaError),
    "another number of them": (lambda d: _tops(d, tokens=[1]), SchemaError),
    "a share beyond one": (lambda d: d["agreement"].update(top1=1e308), SchemaError),
    "a negative divergence": (lambda d: d["agreement"].update(mean_kl=-1.0), SchemaError),
    "a long prompt": (lambda d: _many(d, 1, [1] * 65536), SchemaError),
    "a long text": (lambda d: _said(d, [1] * 513, []), SchemaError),
    "many prompts": (lambda d: _many(d, 65, [1]), SchemaError),
    "many faults": (lambda d: d.update(greedy=[{}] * 100_000), SchemaError),
    "many wrong tokens": (lambda d: _many(d, 1, ["a"] * 60_000), SchemaError),
    "many fields": (lambda d: d.update({f"k{n}": 1 for n in range(100_000)}), LimitError),
    "many bytes": (lambda d: d.update(reason="a" * (4 << 20)), LimitError),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_record_that_is_none_is_refused_at_once(recorded, change):
    document = json.loads((recorded / "llama" / "baseline.json").read_bytes())
    edit, error = REFUSED[change]
    edit(document)
    data = json.dumps(document).encode()
    with measured() as cost, pytest.raises(error, match=r"^baseline\.json: "):
        parse_baseline(data)
    cost.check()


BEYOND = [10**9] * 9
FAILING = {
    "tokens beyond the vocabulary": ("llama", lambda d: _prompts(d, tokens=BEYOND)),
    "a text beyond the vocabulary": ("llama", lambda d: _say(d, 10**9)),
    "likely tokens beyond it": ("llama", lambda d: _tops(d, tokens=[10**9] * 16)),
    "other samples": ("bert", lambda d: _sample(d, [1e308])),
}
ELSEWHERE = ("likely tokens beyond it", "other samples")
"""Where the model was recorded, tokens and digests are compared, and these are not read."""


def _say(document, token):
    for prompt in document["greedy"]:
        said = prompt["converted"]
        said["tokens"] = [token] * len(said["tokens"])


def _sample(document, samples):
    for prompt in document["hidden"]:
        prompt["converted"]["samples"] = samples


@pytest.mark.parametrize(
    ("change", "torch_version"),
    [
        *((change, None) for change in FAILING if change not in ELSEWHERE),
        *((change, "2.0.0") for change in FAILING),
    ],
)
def test_a_record_that_the_model_cannot_run_is_a_finding(recorded, tmp_path, change, torch_version):
    name, edit = FAILING[change]
    folder = tampering.copy_of(recorded / name, tmp_path / "c")
    document = json.loads((folder / "baseline.json").read_bytes())
    edit(document)
    if torch_version is not None:
        document["environment"]["torch"] = torch_version
    tampering.replace_listed(folder, "baseline.json", json.dumps(document).encode())
    began = time.thread_time()
    stage = verify(folder).stage("baseline")
    assert time.thread_time() - began < 20
    assert all(isinstance(finding.error, BaselineError) for finding in stage.findings)
    assert stage.findings


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaModel"]},
        {"is_encoder_decoder": True},
        {"return_dict": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_by_which_the_model_cannot_run_is_a_finding(recorded, tmp_path, change):
    folder = tampering.copy_of(recorded / "llama", tmp_path / "c")
    config = json.loads((folder / "config.json").read_bytes()) | change
    tampering.replace_listed(folder, "config.json", json.dumps(config).encode())
    (finding,) = verify(folder).stage("baseline").findings
    assert str(finding.error).startswith("baseline.json: ")
