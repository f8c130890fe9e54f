"""resident="packed" gives the weights and, without its kernels, the logits of dense loading."""

from __future__ import annotations

import pytest
import torch

import codecllm
from codecllm.formats.errors import UnsupportedEnvironmentError, UsageError
from codecllm.loader import from_pretrained, pretrained
from codecllm.loader.packed import matrix, residency
from codecllm.loader.packed.form import PackedForm
from codecllm.loader.resident.coded_weight import CodedWeight
from tests.integration import tiny_models

WAYS = {
    "int8": {"scheme": "int8"},
    "lossless": {"scheme": "lossless"},
    "bits": {"bits": 5.0, "calibrate": "random"},
    "wide": {"bits": 7.5, "calibrate": "none"},
}
IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    base = tmp_path_factory.mktemp("packed")
    source = tiny_models.llama(base / "source", tied=False)
    for name, options in WAYS.items():
        # All matrices of the tiny model, whatever their size.
        codecllm.convert(source, base / name, baseline=False, include=["*"], **options)
    return base


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets a CPU, which has the slow paths only, load what a GPU would."""
    monkeypatch.setattr(pretrained, "refuse_without_device", lambda *_: None)


def _packed_weights(model):
    return {
        name: weight
        for name, weight in model.named_parameters()
        if isinstance(weight, CodedWeight) and isinstance(weight.form, PackedForm)
    }


@pytest.mark.parametrize("way", WAYS)
def test_weights_and_logits_are_those_of_dense(containers, on_cpu, way):
    dense = from_pretrained(containers / way)
    model = from_pretrained(containers / way, resident="packed")
    assert len(_packed_weights(model)) >= 14
    expected = dict(dense.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight.detach().clone(), expected[name]), name
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


def test_codes_take_their_bits_and_bf16_takes_12(containers, on_cpu):
    for way, most in {"int8": 8.6, "lossless": 12.6, "bits": 6.9}.items():
        weights = _packed_weights(from_pretrained(containers / way, resident="packed")).values()
        elements = sum(weight.numel() for weight in weights)
        # Rows of 64 weights: a scale and the bounds of the exceptions take 8 bytes a row.
        rows = sum(len(weight) for weight in weights)
        bits = 8 * (sum(weight.form.nbytes for weight in weights) - 8 * rows) / elements
        assert bits <= most, way


@pytest.mark.parametrize("way", ["int8", "bits", "wide"])
def test_int8_lies_packed_in_8_bits_where_the_kernels_are(containers, monkeypatch, way):
    monkeypatch.setattr(residency, "has_kernels", lambda device: True)
    dense = from_pretrained(containers / way)
    model = from_pretrained(containers / way, resident="int8")
    weights = _packed_weights(model)
    assert len(weights) >= 14
    assert {weight.form.matrix.bits for weight in weights.values()} == {8}
    expected = dict(dense.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight.detach().clone(), expected[name]), name
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


def test_a_matrix_with_many_exceptions_is_loaded_dense(containers, on_cpu, monkeypatch):
    monkeypatch.setattr(matrix, "MAX_EXCEPTION_SHARE", -1.0)
    dense = from_pretrained(containers / "lossless")
    model = from_pretrained(containers / "lossless", resident="packed")
    assert not _packed_weights(model)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


def test_without_a_gpu_it_is_refused(containers):
    expected = UsageError if torch.cuda.is_available() else UnsupportedEnvironmentError
    with pytest.raises(expected, match="packed"):
        from_pretrained(containers / "int8", resident="packed")
