"""Fails loudly when a name of transformers that the adapter stands on moves."""

from __future__ import annotations

import inspect
import os
import threading

import accelerate
import pytest
import torch
import transformers

from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.loader import from_pretrained, pretrained
from codecllm.loader.hf import adapter
from codecllm.loader.state_dict import LazyTensor


def test_from_pretrained_still_takes_a_state_dict_without_a_path(tiny):
    model = adapter.load_plain(tiny("llama"))
    again, found = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(model.state_dict()), output_loading_info=True
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"} <= found.keys()
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_quantizer_hooks_are_still_called_by_these_names():
    base = transformers.quantizers.base.HfQuantizer
    for name in (
        "_process_model_before_weight_loading",
        "validate_environment",
        "is_serializable",
        "is_trainable",
    ):
        assert hasattr(base, name)
    source = inspect.getsource(base.preprocess_model)
    assert "self._process_model_before_weight_loading(model, **kwargs)" in source


def test_tied_parameters_of_a_tied_model():
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      vocab_size=32, tie_word_embeddings=True)  # fmt: skip
    assert dict(adapter.tied_parameters(transformers.LlamaForCausalLM(config))) == {
        "lm_head.weight": "model.embed_tokens.weight"
    }


def test_registering_twice_changes_nothing():
    adapter.register()
    adapter.register()
    assert (
        transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["codecllm"] is adapter.CodecLLMQuantizer
    )


def test_config_block_keeps_unknown_keys():
    block = adapter.CodecLLMConfig(quant_method="codecllm", scheme="int8", from_a_later_version=[1])
    assert block.to_dict()["from_a_later_version"] == [1]
    assert block.quant_method == "codecllm"


def test_silenced_and_progress_bars_are_put_back():
    logging = transformers.utils.logging
    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with adapter.silenced(), adapter.without_progress_bars():
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.CRITICAL
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, shown)


def test_a_load_asks_for_weights_in_its_own_thread(container, monkeypatch):
    source = inspect.getsource(transformers.core_model_loading.convert_and_load_state_dict_in_model)
    assert 'is_env_variable_true("HF_DEACTIVATE_ASYNC_LOAD")' in source
    asking_threads, decode = [], LazyTensor.to

    def to(self, *args, **kwargs):
        asking_threads.append(threading.get_ident())
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(LazyTensor, "to", to)
    from_pretrained(container("llama", "int8"), progress=False)
    assert set(asking_threads) == {threading.get_ident()}
    asking_threads.clear()
    # Several devices: tensors for them are not decoded ahead.
    monkeypatch.setattr(pretrained, "has_device", lambda: True)
    monkeypatch.setattr(pretrained, "sole_device", lambda *_: None)
    from_pretrained(container("llama", "int8"), device_map="auto", progress=False)
    assert asking_threads
    assert threading.get_ident() not in asking_threads


@pytest.mark.parametrize("callers_value", [None, "0"])
def test_the_switch_of_loading_threads_is_put_back_when_the_last_of_several_loads_ends(
    monkeypatch, callers_value
):
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    monkeypatch.delenv(name, raising=False)
    if callers_value is not None:
        monkeypatch.setenv(name, callers_value)
    pool = transformers.core_model_loading.ThreadPoolExecutor
    first, second = adapter.without_loading_threads(), adapter.without_loading_threads()
    with first:
        second.__enter__()
    assert os.environ[name] == "1"
    second.__exit__(None, None, None)
    assert os.environ.get(name) == callers_value
    assert transformers.core_model_loading.ThreadPoolExecutor is pool


def test_model_class_comes_from_architectures():
    assert (
        adapter.model_class(transformers.BertConfig(architectures=["BertForMaskedLM"]))
        is transformers.BertForMaskedLM
    )
    assert adapter.model_class(transformers.BertConfig()) is transformers.AutoModel
    with pytest.raises(UnsupportedEnvironmentError, match="Nope"):
        adapter.model_class(transformers.BertConfig(architectures=["Nope"]))


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_parameters_are_known_by_their_hooks(tiny, tmp_path, offload):
    model = adapter.load_plain(tiny("llama"))
    names = [name for name, _ in model.named_parameters()]
    assert not any(adapter.is_offloaded(model, name) for name in names)
    where = (tmp_path,) if offload == "disk_offload" else ()
    getattr(accelerate, offload)(model, *where, execution_device=torch.device("cpu"))
    assert all(value.is_meta for value in model.parameters())
    assert all(adapter.is_offloaded(model, name) for name in names)
