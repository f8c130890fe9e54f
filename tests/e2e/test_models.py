"""Real models: the sizes and the texts that README.md promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import codecllm
from codecllm.converter import convert
from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.manifest.records import Int8Tensor, RawTensor
from codecllm.formats.reference import read_symbols, read_tensor_bytes
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier import verify
from codecllm.verifier.diagnosis import Cause, diagnose
from codecllm.verifier.diagnosis.causes import explaining
from codecllm.verifier.evaluation import evaluate
from demo import models
from tests import tampering
from tests.diagnosis import faults

pytestmark = pytest.mark.model
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    base = tmp_path_factory.mktemp("smollm2")
    for scheme in ("int8", "lossless"):
        convert(models.smollm2(), base / scheme, scheme=scheme)
    return base


def _continued(model, folder, tokens=16):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    return ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("resident", ["dense", "int8", "compressed"])
def test_int8_container_generates_the_right_text(smollm2, resident):
    model = codecllm.from_pretrained(smollm2 / "int8", resident=resident)
    tokens = 2 if resident == "compressed" else 16
    assert "Paris" in _continued(model, smollm2 / "int8", tokens)[1]


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_every_residency_gives_the_logits_of_dense(smollm2, scheme):
    ids = torch.arange(500, 548)[None]
    with torch.inference_mode():
        dense = codecllm.from_pretrained(smollm2 / scheme)(ids).logits
        assert torch.equal(
            codecllm.from_pretrained(smollm2 / scheme, resident="compressed")(ids).logits, dense
        )
        if scheme == "int8":
            model = codecllm.from_pretrained(smollm2 / scheme, resident="int8")
            assert torch.equal(model(ids).logits, dense)  # too many rows for the packed kernel
            quick = model(ids[:, :16]).logits
            assert (quick - dense[:, :16]).norm() <= 0.02 * dense[:, :16].norm()


def test_evaluation_of_a_gguf_file(tmp_path):
    """The bf16 source was made from that very file: their distance is the rounding to bf16."""
    score, other = evaluate(
        models.smollm2(), [models.smollm2_gguf(), _int8(tmp_path)], max_tokens=256
    ).scores
    assert score.kind == "gguf"
    assert (
        5 < score.layer_bits_per_weight < 6
    )  # Q4_1 is 5 bits; some layers are stored in larger types
    assert score.mean_kl < 1e-3 < other.mean_kl < 0.05
    assert 7.1 < other.layer_bits_per_weight < 7.4


def _int8(tmp_path):
    convert(models.smollm2(), tmp_path / "int8")
    return tmp_path / "int8"


def test_lossless_container_generates_exactly_the_sources_tokens(smollm2):
    source, _ = _continued(load_plain(models.smollm2()), models.smollm2(), 40)
    ours, _ = _continued(codecllm.from_pretrained(smollm2 / "lossless"), smollm2 / "lossless", 40)
    assert ours == source


@pytest.mark.parametrize(
    "get", [models.minilm, models.minilm_bf16, models.smollm2], ids=lambda get: get.__name__
)
def test_lossless_is_bit_for_bit(tmp_path, get):
    convert(get(), tmp_path / "c", scheme="lossless")
    report = verify(tmp_path / "c", source=get(), baseline=False)
    assert report.exit_code == 0, report.to_json()
    with Container(tmp_path / "c") as container, SourceModel(get()) as source:
        name, tensor = max(source.tensors.items(), key=lambda item: item[1].entry.bytes)
        assert read_tensor_bytes(container, name) == tensor.read_bytes(0, tensor.entry.bytes)


def _matrices(container):
    return [
        record
        for record in container.manifest.tensors
        if len(record.shape) == 2 and record.dtype in ("BF16", "F32") and record.scheme != "alias"
    ]


def _overhead_bytes(container, records):
    """Bytes of shards and manifest that no payload and no other kind of tensor accounts for.

    All of headers, manifest, chunk tables, shapes and padding is counted, but for data, header
    entry and record of the tensors that are not float matrices (norms, biases, integers).
    """
    others = [r for r in container.manifest.tensors if r not in records]
    foreign = 0
    data = (container.folder / "codecllm.json").read_bytes()
    for number in range(len(container.manifest.shards)):
        header = container.shard(number)[1]
        for record in others:
            entry = header.tensors[record.name]
            offsets = f"[{entry.start},{entry.end}]"
            text = (
                f'"{record.name}":{{"dtype":"{entry.dtype.name}","shape":{list(entry.shape)},'
                f'"data_offsets":{offsets}}},'
            )
            foreign += entry.bytes + len(text.replace(" ", ""))
    foreign += sum(
        len(line) + 1
        for line in data.splitlines()
        for r in others
        if line.startswith(f'{{"name":"{r.name}",'.encode())
    )
    payload = sum(
        plane.stored_bytes for r in records if not isinstance(r, RawTensor) for plane in r.planes
    )
    payload += sum(r.source_bytes for r in records if isinstance(r, RawTensor))
    return container.stored_bytes - foreign - payload, payload


def test_bf16_matrices_take_at_most_10_69_bits_per_weight(tmp_path):
    convert(models.minilm_bf16(), tmp_path / "c", scheme="lossless")
    with Container(tmp_path / "c") as container:
        records = _matrices(container)
        overhead, payload = _overhead_bytes(container, records)
        weights = sum(record.elements for record in records)
        assert weights > 22_000_000
        assert 8 * (overhead + payload) / weights <= 10.69


def test_int8_codes_are_close_to_their_entropy_and_the_rest_is_small(tmp_path):
    convert(models.minilm_bf16(), tmp_path / "c")
    with Container(tmp_path / "c") as container:
        records = _matrices(container)
        overhead, payload = _overhead_bytes(container, records)
        quantized = [record for record in records if isinstance(record, Int8Tensor)]
        scales = sum(4 * len(_stored(container, record.name).scales) for record in quantized)
        weights = sum(record.elements for record in records)
        codes = sum(record.elements for record in quantized)
        assert codes > 0.98 * weights
        stored = 8 * sum(record.planes[0].stored_bytes for record in quantized) / codes
        assert stored <= _chunk_entropy(container, quantized) / codes + 0.09
        assert 8 * (overhead - scales) / weights <= 0.02
        assert payload > 0


def _stored(container, name):
    tensor = container.tensor(name)
    assert isinstance(tensor, StoredTensor)
    return tensor


def _chunk_entropy(container, records):
    """Returns the order-0 entropy of the codes, per chunk, in bits, counted exactly."""
    bits = 0.0
    for record in records:
        tensor = _stored(container, record.name)
        symbols = read_symbols(tensor)[0]
        for tile in tensor.table.grid:
            counts = np.bincount(
                symbols[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols].reshape(
                    -1
                )
            )
            bits += sum(-n * math.log2(n / tile.symbols) for n in counts.tolist() if n)
    return bits


@pytest.mark.timeout(900)  # two minutes on two idle cores
def test_diagnosis_of_smollm2(tmp_path):
    """A clean container has no finding; entropy, scales, headers explain its ratio within 1 %."""
    codecllm.convert(models.smollm2(), tmp_path / "out", baseline=True)
    report = diagnose(tmp_path / "out", models.smollm2(), prompts=[PROMPT])
    assert report.exit_code == 0, report.conclusion
    assert not any(stage.findings for stage in report.stages)
    facts = report.stage("quantized").facts
    assert 0.99 < facts["explained_by_entropy"] < 1
    assert 0.995 < facts["explained"] < 1
    assert facts["ratio_per_tensor_scale"] > 2.9
    assert facts["relative_error_per_tensor_scale"] > 3 * facts["relative_error"]
    assert report.stage("text").facts["prompts"][0]["loaded"].startswith(" Paris.")
    assert report.stage("baseline").facts["tokens"] == 256
    assert all(row["off_reference"] == 0 for row in report.stage("layers").facts["layers"])


def test_a_coarse_step_in_one_layer_of_smollm2_is_found(smollm2, tmp_path):
    name = "model.layers.11.mlp.down_proj.weight"
    folder = tampering.copy_of(smollm2 / "int8", tmp_path / "c")
    faults.requantize(folder, models.smollm2(), name, lambda scales: scales * np.float32(10))
    report = diagnose(folder, models.smollm2(), prompts=[PROMPT])
    stage, finding = explaining(report)
    assert (stage.name, finding.cause, finding.error.tensor) == (
        "round trip",
        Cause.COARSE_STEP,
        name,
    )
    assert report.stage("layers").facts["first_departure"]["module"] == name.removesuffix(".weight")
