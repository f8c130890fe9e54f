"""Whole models on a real device, in each form of residency, against the CPU."""

from __future__ import annotations

import pytest
import torch

from codecllm.formats.errors import UsageError
from codecllm.loader import from_pretrained
from codecllm.loader.packed import kernels
from codecllm.loader.packed.form import PackedForm
from codecllm.loader.packed.matrix import can_pack
from codecllm.loader.resident.coded_weight import CodedWeight
from tests.integration import tiny_models
from tests.integration.outputs import same_bits

NAMES = sorted(tiny_models.FEW)


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": 0}, "auto"], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_dense_has_the_bits_of_the_cpu(container, scheme, device_map):
    expected = from_pretrained(container("llama", scheme)).state_dict()
    ours = from_pretrained(container("llama", scheme), device_map=device_map).state_dict()
    assert theirs_are_ours(expected, ours)
    assert all(value.is_cuda for value in ours.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decoder", ["auto", "cpu"])
def test_other_architectures(container, name, decoder):
    folder = container(name, "int8")
    ours = from_pretrained(folder, device_map="cuda", decoder=decoder).state_dict()
    assert theirs_are_ours(from_pretrained(folder).state_dict(), ours)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "bert"])
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_compressed_gives_the_logits_of_dense(container, name, scheme):
    folder = container(name, scheme)
    expected = _logits(from_pretrained(folder, device_map="cuda"))
    model = from_pretrained(folder, device_map="cuda", resident="compressed")
    for _ in range(4):
        assert torch.equal(_logits(model), expected)


def test_compressed_generates_the_tokens_of_dense(container):
    folder = container("qwen3", "int8")
    prompt = {
        "input_ids": torch.arange(5, 12)[None].cuda(),
        "attention_mask": torch.ones(1, 7, dtype=torch.int64).cuda(),
    }
    options = {"max_new_tokens": 16, "do_sample": False}
    dense = from_pretrained(folder, device_map="cuda").generate(**prompt, **options)
    compressed = from_pretrained(folder, device_map="cuda", resident="compressed").generate(
        **prompt, **options
    )
    assert torch.equal(compressed, dense)


@pytest.mark.parametrize("name", NAMES)
def test_int8_stays_near_dense(container, name):
    folder = container(name, "int8")
    expected = _logits(from_pretrained(folder, device_map="cuda"))
    model = from_pretrained(folder, device_map="cuda", resident="int8")
    assert (_logits(model) - expected).norm() <= 0.02 * expected.norm()
    assert all(value.is_cuda for value in model.state_dict().values())
    forms = [weight.form for weight in model.parameters() if isinstance(weight, CodedWeight)]
    assert forms
    packed_forms = [form for form in forms if isinstance(form, PackedForm)]
    if kernels.has_kernels(torch.device("cuda", 0)):
        # Tiny models have matrices whose columns are no multiple of 16, and stacks of experts.
        others = [form for form in forms if form not in packed_forms]
        assert all(len(form.shape) == 3 or not can_pack(*form.shape) for form in others)
    assert all(form.matrix.bits == 8 for form in packed_forms)


def _logits(model):
    """As `outputs.logits`, on the device."""
    ids = torch.arange(3, 23, device="cuda").reshape(2, 10)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.inference_mode():
        return model(**inputs)[0]


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_what_does_not_fit_the_callers_limits_stays_on_the_cpu(container, scheme):
    """An automatic map with limits: the offloaded part of a model takes no device memory."""
    folder = container("llama", scheme)
    expected = _logits(from_pretrained(folder, device_map="cuda"))
    size = sum(value.nbytes for value in from_pretrained(folder).parameters())
    model = from_pretrained(
        folder, device_map="sequential", max_memory={0: size * 4 // 5, "cpu": 10 * size}
    )
    assert set(model.hf_device_map.values()) == {0, "cpu"}
    assert (_logits(model) - expected).norm() <= 0.02 * expected.norm()


def test_a_decoder_of_the_device_is_not_asked_for_elsewhere(container):
    with pytest.raises(UsageError, match=r"decoder 'nvcomp' decodes on a GPU, got device_map=None"):
        from_pretrained(container("llama", "lossless"), decoder="nvcomp")


def theirs_are_ours(expected, ours):
    return expected.keys() == ours.keys() and all(
        same_bits(expected[key], ours[key].cpu()) for key in expected
    )
