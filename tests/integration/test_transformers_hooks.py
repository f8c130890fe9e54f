"""Fails loudly when a private name of transformers that the loader stands on moves or changes."""

from __future__ import annotations

import gc
import inspect
import os
import threading
import time

import accelerate
import pytest
import torch
import transformers
from transformers import core_model_loading, modeling_utils

from codecllm.formats.container import Container
from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.loader import from_pretrained, load
from codecllm.loader.hf import experts, hooks, placement, quantizer, quiet
from codecllm.loader.hf.model_class import described_tensors, model_class
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.state_dict import LazyTensor


def _original(function):
    return getattr(function, "_codecllm_original", function)


def test_tied_parameters_of_a_tied_model():
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    assert dict(hooks.tied_parameters(transformers.LlamaForCausalLM(config))) == {
        "lm_head.weight": "model.embed_tokens.weight"
    }


def test_from_pretrained_still_takes_a_state_dict_without_a_path(tiny):
    model = load_plain(tiny("llama"))
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
        "dequantize",
        "remove_quantization_config",
    ):
        assert hasattr(base, name)
    source = inspect.getsource(base.preprocess_model)
    assert "self._process_model_before_weight_loading(model, **kwargs)" in source


def test_transformers_still_marks_configs_of_quantized_models_by_this_name():
    source = inspect.getsource(transformers.quantizers.base._assign_is_quantized)
    assert f"module.config.{quantizer.QUANTIZED_MARK} = True" in source


def test_registering_twice_changes_nothing():
    quantizer.register()
    quantizer.register()
    assert (
        transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["codecllm"]
        is quantizer.CodecLLMQuantizer
    )


def test_config_block_keeps_unknown_keys():
    block = quantizer.CodecLLMConfig(
        quant_method="codecllm", scheme="int8", from_a_later_version=[1]
    )
    assert block.to_dict()["from_a_later_version"] == [1]
    assert block.quant_method == "codecllm"


def test_silenced_and_progress_bars_are_put_back():
    logging = transformers.utils.logging
    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet.silenced(), quiet.without_progress_bars():
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.CRITICAL
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, shown)


def test_the_wrapped_steps_take_the_arguments_that_the_wrappers_pass():
    dtype = inspect.signature(_original(modeling_utils._get_dtype))
    names = [
        "dtype",
        "checkpoint_files",
        "config",
        "sharded_metadata",
        "state_dict",
        "weights_only",
        "hf_quantizer",
    ]
    assert list(dtype.parameters) == names
    weights = inspect.signature(_original(modeling_utils.convert_and_load_state_dict_in_model))
    assert list(weights.parameters) == ["model", "state_dict", "load_config", "disk_offload_index"]
    source = inspect.getsource(modeling_utils.PreTrainedModel.from_pretrained)
    assert "_get_dtype(" in source
    assert "cls.get_init_context(" in source
    assert "cls._finalize_model_loading(" in source
    loading = inspect.getsource(modeling_utils.PreTrainedModel._load_pretrained_model)
    assert "convert_and_load_state_dict_in_model(" in loading
    fields = modeling_utils.LoadStateDictConfig.__dataclass_fields__
    assert {"hf_quantizer", "weight_mapping", "dtype_plan", "device_map"} <= fields.keys()


def test_config_classes_still_take_a_part_of_a_dictionary_by_these_names():
    base = transformers.PreTrainedConfig
    assert (base.base_config_key, base.model_type) == ("", "")
    assert transformers.CLIPTextConfig.base_config_key == "text_config"
    source = inspect.getsource(base.from_pretrained)
    assert "cls.get_config_dict(" in source
    assert "config_dict[cls.base_config_key]" in source


def test_installing_again_wraps_nothing_twice():
    read = transformers.PreTrainedConfig.get_config_dict
    before = modeling_utils._get_dtype, modeling_utils.PreTrainedModel.get_init_context
    original = _original(modeling_utils._get_dtype)
    hooks.install(quantizer.CodecLLMQuantizer)
    assert _original(modeling_utils._get_dtype) is original
    assert modeling_utils.PreTrainedModel.get_init_context == before[1]
    assert read == transformers.PreTrainedConfig.get_config_dict


def test_building_and_finishing_hold_the_lock():
    context = transformers.LlamaForCausalLM.get_init_context(torch.float32, False, False, False)
    assert context[0] is hooks.building()
    assert hasattr(modeling_utils.PreTrainedModel._finalize_model_loading, "__wrapped__")


def test_a_load_asks_for_weights_in_its_own_thread_unless_they_go_to_several_devices(
    container, monkeypatch
):
    source = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert "not hf_quantizer.pre_quantized" in source
    askers, decode = [], LazyTensor.to

    def to(self, *given, **named):
        askers.append(threading.get_ident())
        return decode(self, *given, **named)

    monkeypatch.setattr(LazyTensor, "to", to)
    from_pretrained(container("llama", "int8"), progress=False)
    assert set(askers) == {threading.get_ident()}
    askers.clear()
    monkeypatch.setattr(load, "has_device", lambda: True)
    monkeypatch.setattr(load, "sole_device", lambda *_: None)
    from_pretrained(container("llama", "int8"), device_map="auto", progress=False)
    assert askers
    assert threading.get_ident() not in askers


def test_model_class_comes_from_architectures():
    config = transformers.BertConfig(architectures=["BertForMaskedLM"])
    assert model_class(config) is transformers.BertForMaskedLM


def test_without_tensors_the_class_is_the_first_of_the_usual_ones():
    assert model_class(transformers.BertConfig()) is transformers.BertForMaskedLM
    decoder = transformers.BertConfig(is_decoder=True)
    assert model_class(decoder) is transformers.BertLMHeadModel


@pytest.mark.parametrize("names", [None, [], ["Nope"], [5], "text", ["AutoModelForCausalLM"]])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "LlamaForCausalLM"), ("t5", "T5ForConditionalGeneration"), ("mpnet", "MPNetModel")],
)
def test_model_class_without_a_known_architecture_is_the_one_that_the_weights_fill(
    container, name, kind, names
):
    with Container(container(name, "int8")) as opened:
        config = transformers.AutoConfig.from_pretrained(opened.folder)
        config.__dict__["architectures"] = names  # as a file may have it: older ones check the type
        assert model_class(config, lambda: described_tensors(opened)).__name__ == kind


def test_a_config_for_which_transformers_has_no_class_is_an_error():
    with pytest.raises(UnsupportedEnvironmentError, match="has no class"):
        model_class(transformers.PretrainedConfig(architectures=["Nope"]))


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_parameters_are_known_by_their_hooks(tiny, tmp_path, offload):
    model = load_plain(tiny("llama"))
    names = [name for name, _ in model.named_parameters()]
    assert not any(placement.is_offloaded(model, name) for name in names)
    where = (tmp_path,) if offload == "disk_offload" else ()
    getattr(accelerate, offload)(model, *where, execution_device=torch.device("cpu"))
    assert all(value.is_meta for value in model.parameters())
    assert all(placement.is_offloaded(model, name) for name in names)


def test_experts_are_marked_and_their_loop_takes_one_weight_after_the_other(tiny, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("mixtral"))
    marked = [module for module in model.modules() if experts.loops_over_experts(module)]
    assert len(marked) == model.config.num_hidden_layers
    transposed = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt_oss"))
    assert not any(experts.loops_over_experts(module) for module in transposed.modules())
    experts.use_loop(model)
    weights = {id(weight) for module in marked for weight in module.parameters()}
    shapes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda inputs, weight, *rest: (
            shapes.append((weight.dim(), id(weight._base) in weights))
            or linear(inputs, weight, *rest)
        ),
    )
    model(torch.tensor([[1, 2, 3]]))
    assert (2, True) in shapes
    assert all(dims == 2 for dims, _ in shapes)


@pytest.mark.parametrize("load_model", [from_pretrained, transformers.AutoModel.from_pretrained])
def test_the_search_for_cycles_pauses_while_weights_are_taken(container, monkeypatch, load_model):
    folder, seen = container("llama", "lossless"), []
    take = LazyTensor.to

    def to(self, *args, **kwargs):
        seen.append(gc.isenabled())
        return take(self, *args, **kwargs)

    monkeypatch.setattr(LazyTensor, "to", to)
    load_model(folder)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_a_fork_waits_until_no_other_thread_builds_a_model():
    """Else the child waits for ever, or makes its models in the dtype of the other's."""
    held, default = threading.Event(), torch.get_default_dtype()

    def build():
        with hooks.building():
            torch.set_default_dtype(torch.float16)
            held.set()
            time.sleep(0.5)
            torch.set_default_dtype(default)

    thread = threading.Thread(target=build)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        is_free = hooks.building().acquire(timeout=5)
        os._exit(0 if is_free and torch.get_default_dtype() == default else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
    with hooks.building():
        pass
