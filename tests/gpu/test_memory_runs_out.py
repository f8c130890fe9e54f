"""A device whose memory runs out during a load: one error, nothing left there, and the next load
is right.
"""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from codecllm.converter import convert
from codecllm.loader import from_pretrained

IDS = torch.arange(3, 23).reshape(2, 10)
PARTS = (0.05, 0.3, 0.6, 0.9)
"""Of the memory that the loaded model holds: with less than all of it no load can end."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of 90 MB, lossless and int8: its weights take many segments of torch's allocator."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=8192, tie_word_embeddings=True,
    )  # fmt: skip
    base = tmp_path_factory.mktemp("memory")
    LlamaForCausalLM(config).bfloat16().save_pretrained(base / "source")
    for scheme in ("lossless", "int8"):
        convert(base / "source", base / scheme, scheme=scheme)
    return base


def _load(folder, resident):
    return from_pretrained(folder, device_map="cuda", resident=resident)


def _logits(model):
    with torch.inference_mode():
        return model(IDS.cuda()).logits


def _held():
    """Bytes that torch holds on the device, behind everything that is not in use."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
@pytest.mark.parametrize("resident", ["dense", "packed"])
def test_a_load_without_memory_is_an_error_that_gives_it_back(folders, scheme, resident):
    folder = folders / scheme
    # What a first load and a first product make once and keep is not the model's.
    expected = _logits(_load(folder, resident))
    before = _held()
    model = _load(folder, resident)
    needed = _held() - before
    del model
    assert _held() <= before
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    for part in PARTS:
        base = torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction((base + part * needed) / total)
        try:
            with pytest.raises(torch.OutOfMemoryError) as raised:
                _load(folder, resident)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert "out of memory" in str(raised.value), part
        del raised
        assert _held() <= before, part
    # An error of an earlier load is no state of the device or of transformers.
    assert torch.equal(_logits(_load(folder, resident)), expected)


def test_a_model_on_the_device_survives_a_load_that_has_no_memory(folders):
    model = _load(folders / "int8", "packed")
    expected = _logits(model)
    _held()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (8 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            _load(folders / "lossless", "dense")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(_logits(model), expected)
