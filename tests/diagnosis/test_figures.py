"""The figures of a diagnosis against computations that share no code with it."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file

from codecllm.converter import convert
from codecllm.formats.codecs.entropy import counted_entropy_bits, prefix_code_bits
from codecllm.formats.container import Container
from codecllm.formats.reference import read_codes
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier.diagnosis import diagnose, render_html
from codecllm.verifier.diagnosis.model.sample_text import SAMPLE_TEXT
from codecllm.verifier.report import Verdict
from tests.diagnosis import faults
from tests.integration import tiny_models

PROMPTS = ["The capital", "1, 1, 2, 3,"]
TEXT = "To be, or not to be, that is the question."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny_models.llama(tmp_path_factory.mktemp("source") / "llama")
    faults.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, source):
    out = tmp_path_factory.mktemp("out") / "c"
    convert(source, out, include=("*",))
    return out


@pytest.fixture(scope="module")
def report(made, source):
    return diagnose(made, source, prompts=PROMPTS, text=TEXT)


def _entropy(codes):
    counts = Counter(codes.reshape(-1).tolist())
    return -sum(count * math.log2(count / codes.size) for count in counts.values())


def test_errors_codes_entropy_and_sizes_of_every_tensor(report, made, source):
    rows = {row["name"]: row for row in report.stage("quantized").facts["tensors"]}
    tensors = load_file(source / "model.safetensors")
    with Container(made) as container:
        for name, row in rows.items():
            weights = tensors[name].double().numpy()
            stored = container.tensor(name)
            codes, scales = read_codes(stored), stored.scales.astype(np.float64)
            held, single = row["per_channel"], row["per_tensor"]
            error = weights - codes * scales[:, None]
            assert held["relative_error"] == pytest.approx(
                np.linalg.norm(error) / np.linalg.norm(weights), rel=1e-4
            )
            assert held["worst_error"] == pytest.approx(np.abs(error).max(), rel=1e-4)
            assert held["codes_in_use"] == len(np.unique(codes))
            assert held["entropy_bits_per_weight"] == pytest.approx(
                _entropy(codes) / codes.size, rel=1e-9
            )
            entry = sum(chunk.stored_bytes for chunk in stored.table.chunks)
            assert held["bits_per_weight"] == pytest.approx(
                (8 * entry + 32 * len(scales)) / codes.size
            )
            scale = np.float32(np.abs(weights).max()) / np.float32(127)
            together = np.rint(weights.astype(np.float32) / scale)
            error = weights - together * float(scale)
            assert single["relative_error"] == pytest.approx(
                np.linalg.norm(error) / np.linalg.norm(weights), rel=1e-4
            )
            assert single["codes_in_use"] == len(np.unique(together))
            assert single["entropy_bits_per_weight"] == pytest.approx(
                _entropy(together) / codes.size, rel=1e-9
            )
    assert len(rows) == 15


def test_the_parts_of_the_ratio_add_up(report, made):
    facts = report.stage("quantized").facts
    size = (
        sum(path.stat().st_size for path in made.glob("*.safetensors"))
        + (made / "codecllm.json").stat().st_size
    )
    assert facts["stored_bytes"] == size
    assert sum(facts["bits"].values()) == pytest.approx(facts["bits_per_weight"])
    assert facts["bits_per_weight"] == pytest.approx(8 * size / facts["weights"])
    assert facts["ratio"] == pytest.approx(facts["source_bytes"] / size)
    codes = facts["histograms"]["per_channel"]
    rows = facts["tensors"]
    assert sum(codes) == sum(row["elements"] for row in rows)
    entropy = sum(row["elements"] * row["per_channel"]["entropy_bits_per_weight"] for row in rows)
    assert facts["bits"]["entropy"] * facts["weights"] == pytest.approx(entropy)


def test_prefix_codes():
    rng = np.random.default_rng(0)
    for counts in (
        [1],
        [5, 5],
        [1, 1, 2, 4],
        rng.integers(1, 1000, 40).tolist(),
        rng.integers(1, 9, 255).tolist(),
    ):
        heap = [(count, [index]) for index, count in enumerate(counts)]
        lengths = [0] * len(counts)
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, left), (b, right) = heapq.heappop(heap), heapq.heappop(heap)
            for index in left + right:
                lengths[index] += 1
            heapq.heappush(heap, (a + b, left + right))
        bits = sum(count * length for count, length in zip(counts, lengths, strict=True))
        assert prefix_code_bits(np.array(counts)) == bits
        assert counted_entropy_bits(np.array(counts)) <= bits + 1e-9
        assert bits < counted_entropy_bits(np.array(counts)) + sum(counts)
    assert prefix_code_bits(np.zeros(3, np.int64)) == 0


def test_layer_outputs_are_those_of_transformers(report, made, source):
    plain, loaded = load_plain(source).eval(), from_pretrained(made)
    tokens = report.stage("layers").facts["tokens"]
    assert tokens == 48
    ids = torch.tensor([_tokens(source, SAMPLE_TEXT)[:tokens]])
    with torch.inference_mode():
        a, b = (model(ids, output_hidden_states=True) for model in (plain, loaded))
    rows = {row["name"]: row for row in report.stage("layers").facts["layers"]}
    assert list(rows) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]
    pairs = {"model.embed_tokens": 0, "model.layers.0": 1}
    values = {
        name: (a.hidden_states[place], b.hidden_states[place]) for name, place in pairs.items()
    }
    values["lm_head"] = (a.logits, b.logits)
    for name, (x, y) in values.items():
        x, y = x.double().numpy().ravel(), y.double().numpy().ravel()
        assert rows[name]["relative_error"] == pytest.approx(
            np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-6
        )
        assert 1 - rows[name]["cosine"] == pytest.approx(
            1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-3
        )
        assert rows[name]["off_reference"] == 0


def test_divergence_and_perplexity(report, made, source):
    plain, loaded = load_plain(source).eval(), from_pretrained(made)
    facts, kls, hits, total = report.stage("text").facts, [], 0, 0
    for row in facts["prompts"]:
        ids = torch.tensor([_tokens(source, row["prompt"])])
        with torch.inference_mode():
            out = ids
            for _ in range(32):  # no end-of-text token stops it
                out = torch.cat([out, plain(out).logits[:, -1:].argmax(-1)], 1)
            p, q = (
                model(out, use_cache=False).logits[0, ids.shape[1] - 1 : -1].double()
                for model in (plain, loaded)
            )
        p, q = (value.log_softmax(-1) for value in (p, q))
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        hits, total = hits + int((p.argmax(-1) == q.argmax(-1)).sum()), total + len(p)
    assert facts["mean_kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert facts["top1"] == pytest.approx(hits / total)
    ids = torch.tensor([_tokens(source, TEXT)])
    for model, key in ((plain, "perplexity_of_source"), (loaded, "perplexity_of_loaded")):
        with torch.inference_mode():
            loss = model(ids, labels=ids).loss
        assert facts[key] == pytest.approx(math.exp(float(loss)), rel=2e-3)
    assert facts["text_tokens"] == len(TEXT) - 1


def test_report_is_json_and_a_page_without_network(report):
    document = json.loads(report.to_json())
    assert document["conclusion"] == report.conclusion
    assert [stage["name"] for stage in document["stages"]][2:7] == [
        "round trip",
        "quantized",
        "loaded",
        "layers",
        "text",
    ]
    page = render_html(report)
    assert page.count("<svg") == 7
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    for name in (
        "model.layers.1.mlp.up_proj.weight",
        "No fault found",
        "Histogram of the codes",
        "The capital",
    ):
        assert name in page


def test_a_page_escapes_what_it_was_given(made, source):
    report = diagnose(made, source, prompts=["<b>bold</b>"], text=TEXT)
    page = render_html(report)
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
@pytest.mark.parametrize(
    "name", ["gpt2", "qwen3_moe", "t5", "bert", "llama_untied", "gpt_neox", "mamba"]
)
def test_clean_containers_of_other_architectures_have_no_finding(container, tiny, name, scheme):
    report = diagnose(container(name, scheme), tiny(name), prompts=PROMPTS, text=TEXT)
    assert report.exit_code == 0, report.conclusion
    assert not any(stage.findings for stage in report.stages)
    ran = [stage.name for stage in report.stages if stage.verdict is Verdict.OK]
    assert ran[:7] == [
        "structure",
        "checksums",
        "round trip",
        "quantized",
        "loaded",
        "layers",
        "text",
    ]
    assert all(row["off_reference"] == 0 for row in report.stage("layers").facts["layers"])


def _tokens(source, text):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids


def test_zstd_is_the_library_that_the_report_names(report):
    versions = report.stage("round trip").facts["versions"]
    assert versions["zstd"] == ".".join(map(str, zstandard.ZSTD_VERSION))
    assert versions["torch"] == torch.__version__
