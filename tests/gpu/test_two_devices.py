"""Models on a device that is not current, and on two. Skipped, with the reason, without two."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from codecllm.converter import convert
from codecllm.loader import from_pretrained
from tests.gpu.test_models import NAMES, theirs_are_ours

RESIDENT = [
    ("int8", "dense"),
    ("int8", "int8"),
    ("int8", "compressed"),
    ("lossless", "dense"),
    ("lossless", "compressed"),
]


@pytest.fixture(scope="module", autouse=True)
def two():
    """Skips where there are not two."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices: torch finds {torch.cuda.device_count()}")


@pytest.fixture(scope="module")
def large_llama(tmp_path_factory):
    """Containers of a Llama of 290 MB, by scheme: several batches for each device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    base = tmp_path_factory.mktemp("large-llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base / "source")
    made = {}
    for scheme in ("int8", "lossless"):
        made[scheme] = base / scheme
        convert(base / "source", made[scheme], scheme=scheme)
    return made


def _logits(model, device=None):
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 23).reshape(2, 10).to(device or model.device))[
            0
        ].cpu()


def _places(model):
    return {str(value.device) for value in model.parameters()}


def _split(layers):
    """A device map of a Llama in two halves, embedding and head on either side."""
    half = {f"model.layers.{n}": int(n >= layers // 2) for n in range(layers)}
    return {"model.embed_tokens": 0, **half, "model.norm": 1, "model.rotary_emb": 1, "lm_head": 1}


@pytest.mark.parametrize("decoder", ["auto", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_dense_on_a_device_that_is_not_the_current_one(container, name, decoder):
    model = from_pretrained(container(name, "int8"), device_map="cuda:1", decoder=decoder)
    assert theirs_are_ours(
        from_pretrained(container(name, "int8")).state_dict(), model.state_dict()
    )
    assert _places(model) == {"cuda:1"}
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(("scheme", "resident"), RESIDENT)
def test_logits_are_the_same_on_either_device(large_llama, scheme, resident):
    first, second = (
        from_pretrained(large_llama[scheme], device_map=f"cuda:{n}", resident=resident)
        for n in (0, 1)
    )
    assert _places(second) <= {"cuda:1"}
    assert torch.equal(_logits(first), _logits(second))


@pytest.mark.parametrize("way", ["ours", "plain"])
@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", _split(10)], ids=["auto", "balanced", "halves"]
)
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_dense_over_two_devices_has_the_bits_of_the_cpu(large_llama, scheme, device_map, way):
    load = from_pretrained if way == "ours" else AutoModelForCausalLM.from_pretrained
    expected = from_pretrained(large_llama[scheme]).state_dict()
    for _ in range(3):
        model = load(large_llama[scheme], device_map=device_map)
        assert _places(model) == {"cuda:0", "cuda:1"}
        assert theirs_are_ours(expected, model.state_dict())


@pytest.mark.parametrize(("scheme", "resident"), RESIDENT)
@pytest.mark.parametrize("device_map", ["balanced", _split(10)], ids=["balanced", "halves"])
def test_logits_of_a_spread_model_are_those_of_one_device(
    large_llama, scheme, device_map, resident
):
    expected = _logits(from_pretrained(large_llama[scheme], device_map="cuda:0", resident=resident))
    model = from_pretrained(large_llama[scheme], device_map=device_map, resident=resident)
    assert set(model.hf_device_map.values()) == {0, 1}
    assert torch.equal(_logits(model), expected)
    ids = torch.arange(5, 12)[None].to(model.device)
    tokens = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    assert tokens.shape == (1, 15)


@pytest.mark.parametrize(("scheme", "resident"), RESIDENT)
def test_a_part_stays_on_the_cpu(large_llama, scheme, resident):
    split = {**_split(10), "model.embed_tokens": "cpu", "model.layers.0": "cpu"}
    expected = from_pretrained(large_llama[scheme], device_map="cuda:0")
    model = from_pretrained(large_llama[scheme], device_map=split, resident=resident)
    ours, theirs = _logits(model, "cuda:0"), _logits(expected)  # its own device is meta
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("resident", ["dense", "int8"])
def test_compiled_on_a_device_that_is_not_the_current_one(container, resident):
    model = from_pretrained(
        container("llama", "int8"), device_map="cuda:1", dtype="bfloat16", resident=resident
    )
    expected = _logits(model)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert (_logits(model) - expected).norm() <= 0.02 * expected.norm()


def test_int8_refuses_tensors_of_two_devices():
    from codecllm.loader.kernels.int8_linear import int8_linear

    codes, scale = (
        torch.zeros(64, 64, dtype=torch.int8, device="cuda:1"),
        torch.ones(64, device="cuda:1"),
    )
    with pytest.raises(ValueError, match="inputs lie on cuda:0, codes on cuda:1"):
        int8_linear(torch.zeros(1, 64, dtype=torch.bfloat16, device="cuda:0"), codes, scale, None)
