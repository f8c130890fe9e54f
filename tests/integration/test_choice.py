"""The residency that is chosen by the free memory, and the bytes that the choice counts on."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.loader import choice, from_pretrained
from codecllm.loader.choice import bytes_in_memory, cache_bytes, choose_resident
from codecllm.loader.load import Load, LoadOptions
from tests.integration.outputs import logits


def _sizes(folder, dtype=None):
    with Container(folder) as opened:
        return bytes_in_memory(opened.manifest, dtype)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
@pytest.mark.parametrize("scheme", ["lossless", "int8"])
def test_sizes_are_those_of_loaded_models(container, name, scheme):
    folder = container(name, scheme)
    for dtype in (None, torch.float32):
        model = from_pretrained(folder, resident="dense", dtype=dtype)
        counted = {value.data_ptr(): value.nbytes for value in model.parameters()}
        assert _sizes(folder, dtype).dense == pytest.approx(sum(counted.values()), rel=0.02)
    sizes = _sizes(folder)
    if scheme == "lossless":
        assert sizes.int8 is None
        return
    model = from_pretrained(folder, resident="int8")
    assert sizes.int8 == pytest.approx(model.get_memory_footprint(return_buffers=False), rel=0.1)
    assert sizes.int8 < sizes.dense


def _with_free(monkeypatch, size):
    monkeypatch.setattr(choice, "available_memory", lambda: int(size) + choice.SPARE_BYTES)


@pytest.mark.parametrize(
    ("scheme", "share", "expected"),
    [
        ("int8", 1.5, "dense"),
        ("int8", 0.8, "int8"),
        ("int8", 0.1, "compressed"),
        ("lossless", 1.5, "dense"),
        ("lossless", 0.5, "compressed"),
    ],
)
def test_the_first_that_fits_is_taken(container, monkeypatch, caplog, scheme, share, expected):
    folder = container("llama", scheme)
    if expected == "compressed":
        # Payloads of a tiny model are larger than its weights: tables and headers weigh more.
        monkeypatch.setattr(
            choice, "bytes_in_memory", lambda *_: choice.Residence(1 << 20, None, 1 << 19)
        )
    size = choice.bytes_in_memory(None) if expected == "compressed" else _sizes(folder)
    cache = cache_bytes(json.loads((folder / "config.json").read_text()))
    _with_free(monkeypatch, share * size.dense + cache)
    with caplog.at_level(logging.INFO, "codecllm.loader.load"):
        model = from_pretrained(folder)
    assert model.codecllm_resident.resident == expected
    (line,) = [entry for entry in caplog.records if entry.name == "codecllm.loader.load"]
    assert f"resident='{expected}': dense weights need" in line.message
    assert line.levelno == (logging.INFO if expected == "dense" else logging.WARNING)
    dense = from_pretrained(folder, resident="dense")
    assert dense.codecllm_resident.reason == "the caller asked for it"
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.05, atol=0.05)
    is_plain = type(next(model.parameters())) is torch.nn.Parameter
    assert is_plain == (expected == "dense")


def test_weights_are_dense_where_no_other_form_is_smaller(container, monkeypatch):
    _with_free(monkeypatch, 0)
    with Container(container("llama", "lossless")) as opened:
        sizes = bytes_in_memory(opened.manifest)
        assert sizes.compressed >= sizes.dense  # of a tiny model: tables and headers weigh more
        chosen = choose_resident(opened, {})
    assert chosen.resident == "dense"
    assert chosen.reason.endswith("and no other form is smaller")


def test_on_a_gpu_packed_takes_the_place_of_dense(container, monkeypatch):
    device = torch.device("cuda", 0)
    with Container(container("llama", "int8")) as opened:
        size = bytes_in_memory(opened.manifest).dense + choice.SPARE_BYTES
        for free, expected in ((size + 1, "dense"), (size - 1, "packed")):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place, free=free: (free, free))
            assert choose_resident(opened, {}, None, device).resident == expected


def test_maps_that_spread_and_quantized_sources_stay_dense(container, monkeypatch):
    _with_free(monkeypatch, 0)
    folder = container("llama", "int8")
    load = Load(folder, LoadOptions(resident="auto", device_map="auto"))
    load.close()
    assert load.chosen.resident == "dense"
    with Container(folder) as opened:
        source = opened.manifest.source.model_copy(update={"quantization": "fp8"})
        opened.manifest = opened.manifest.model_copy(update={"source": source})
        assert choose_resident(opened, {}).resident == "dense"


def test_the_cache_is_that_of_the_text_model_and_its_longest_text():
    config = {"num_attention_heads": 8, "hidden_size": 64, "num_hidden_layers": 3}
    assert cache_bytes(config) == 2 * 3 * 64 * 4096 * 2
    assert cache_bytes({**config, "num_key_value_heads": 2}) == 2 * 3 * 16 * 4096 * 2
    assert cache_bytes({**config, "max_position_embeddings": 100}) == 2 * 3 * 64 * 100 * 2
    assert cache_bytes({"text_config": config}, torch.float32) == 2 * 3 * 64 * 4096 * 4
    assert cache_bytes({"text_config": config, "head_dim": 4}) == 2 * 3 * 32 * 4096 * 2
    for strange in ({}, {"num_attention_heads": "8"}, {"num_attention_heads": -1}):
        assert cache_bytes(strange) == 0


def test_an_unknown_residency_is_refused(container):
    with pytest.raises(UsageError, match="not a value of resident"):
        from_pretrained(container("llama", "int8"), resident="fast")
