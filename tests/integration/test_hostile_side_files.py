"""Side files that are damaged or hostile: one typed error that names the file, before weights."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
import transformers as hf

from codecllm.formats.errors import CodecLLMError, ModelMismatchError
from codecllm.loader import from_pretrained, load
from codecllm.loader.config_size import check_config_size
from tests.integration.outputs import logits
from tests.tampering import copy_of, replace_listed

HOSTILE = {
    "a list": b"[]",
    "no JSON": b"{not json",
    "nested": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a cache that does not exist": b'{"cache_implementation": "nope"}',
}


@pytest.mark.parametrize("content", HOSTILE)
def test_generation_config(tmp_path, container, monkeypatch, content):
    folder = copy_of(container("llama", "int8"), tmp_path / "c")
    replace_listed(folder, "generation_config.json", HOSTILE[content])
    monkeypatch.setattr(load.Load, "start", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CodecLLMError, match=r"generation_config\.json"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**9}, {"num_hidden_layers": 200_000}, {"n_routed_experts": 10**7}],
    ids=str,
)
def test_a_config_that_describes_far_more_modules_is_refused_at_once(tmp_path, container, change):
    folder = copy_of(container("llama", "int8"), tmp_path / "c")
    config = json.loads((folder / "config.json").read_text()) | change
    replace_listed(folder, "config.json", json.dumps(config).encode())
    began = time.thread_time()
    with pytest.raises(ModelMismatchError, match="more modules than the container has tensors"):
        from_pretrained(folder)
    assert time.thread_time() - began < 5


def test_sizes_and_ids_are_no_counts_of_modules():
    config = {"expert_capacity_size": 10**6, "block_size": 8192, "text_config": {"n_layer": 12}}
    check_config_size(config, 10)
    with pytest.raises(ModelMismatchError, match=r"text_config\.n_layer"):
        check_config_size({"text_config": {"n_layer": 10**6}}, 10)


def test_loads_in_several_threads_are_right_and_leave_no_trace(container):
    folder = container("llama", "int8")
    expected = {name: value.dtype for name, value in from_pretrained(folder).state_dict().items()}
    output = logits(from_pretrained(folder))
    logging = hf.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()
    models, errors = [], []

    def run(number):
        loaders = (from_pretrained, hf.AutoModelForCausalLM.from_pretrained)
        try:
            models.extend(loaders[number % 2](folder) for _ in range(3))
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(models) == 18
    for model in models:
        values = model.state_dict()
        assert {name: value.dtype for name, value in values.items()} == expected
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(logits(model), output)
    after = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()
    assert after == before
