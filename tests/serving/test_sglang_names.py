"""The names of SGLang that the plug-in uses: this test fails where one of them moves."""

from __future__ import annotations

import tomllib

import pytest

from tests.serving.engine import ROOT
from tests.serving.module_imports import files_that_import
from tests.serving.sglang_engine import run, why_not
from tests.serving.sglang_environment import VERSION

needs_sglang = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_one_file_names_sglang():
    assert files_that_import("sglang") == ["sglang_names.py"]


def test_the_entry_point_names_the_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["sglang.srt.plugins"] == {
        "codecllm": "codecllm.serving.sglang_plugin:register"
    }


def test_the_page_names_the_tested_version():
    assert f"SGLang {VERSION}" in (ROOT / "docs" / "serving.md").read_text()


_NAMES = """
import dataclasses, inspect
from sglang.srt.model_loader import loader as module
from codecllm.serving import sglang_names as names

def parameters(function):
    return list(inspect.signature(function).parameters)

loader = names.DefaultModelLoader
assert parameters(module.get_model_loader) == ["load_config", "model_config"]
assert parameters(loader.load_model) == ["self", "model_config", "device_config"]
assert parameters(loader.load_weights_and_postprocess) == ["model", "weights", "target_device"]
assert parameters(loader.load_weights_only) == ["model", "weights", "target_device"]
assert parameters(loader.postprocess_weights) == ["model", "target_device"]
assert parameters(loader.download_model) == ["self", "model_config"]
assert parameters(loader._get_weights_iterator)[:2] == ["self", "source"]
assert parameters(loader._filter_mtp_weights) == ["weights_iterator", "prefix", "draft_model_idx"]
assert loader.counter_before_loading_weights == 0
assert parameters(loader._get_all_weights) == ["self", "model_config", "model"]
source = inspect.getsource(loader.load_model)
assert "self.load_weights_and_postprocess(" in source and "self._get_all_weights(" in source
source = inspect.getsource(loader._get_all_weights)
assert source.count("self._get_weights_iterator(") == 2
source = inspect.getsource(loader.load_weights_and_postprocess)
calls = [line.strip() for line in source.splitlines()[2:]]
assert calls == [
    "DefaultModelLoader.load_weights_only(model, weights, target_device)",
    "DefaultModelLoader.postprocess_weights(model, target_device)",
]
fields = {field.name for field in dataclasses.fields(loader.Source)}
assert {"model_or_path", "revision", "prefix", "model_config"} <= fields
config = names.LoadConfig()
assert config.load_format == names.LoadFormat.AUTO and config.draft_model_idx is None
assert config.download_dir is None and config.model_loader_extra_config == {}
source = inspect.getsource(module._get_quantization_config)
assert "if model_config.quantization is not None:" in source and "return None" in source
"""


@needs_sglang
def test_every_name_is_where_it_was():
    done = run(["-c", _NAMES])
    assert done.returncode == 0, done.stdout[-2000:]


_TWICE = """
import sys
from types import SimpleNamespace
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from codecllm.formats.errors import UsageError
from codecllm.serving import sglang_names, sglang_plugin

load_plugins()
sglang_plugin.register()
HookRegistry.apply_hooks()
assert "codecllm.loader" not in sys.modules

from sglang.srt.model_loader import get_model_loader
from sglang.srt.model_loader.loader import DefaultModelLoader

assert get_model_loader is sys.modules["sglang.srt.model_loader.loader"].get_model_loader
assert len(HookRegistry._hooks["sglang.srt.model_loader.loader.get_model_loader"]) == 1

def choose(quantization="codecllm", **fields):
    model = SimpleNamespace(quantization=quantization, model_path="x")
    return get_model_loader(load_config=sglang_names.LoadConfig(**fields), model_config=model)

def refused(**fields):
    try:
        choose(**fields)
    except (UsageError, ValueError) as exc:
        return str(exc)
    raise AssertionError(fields)

assert type(choose(quantization=None)) is DefaultModelLoader
ours = choose(model_loader_extra_config={"workers": 1, "num_threads": 3})
assert type(ours).__name__ == "CodecLLMLoader" and ours.options.workers == 1
assert ours.load_config.model_loader_extra_config == {"num_threads": 3}
for load_format in ("safetensors", "dummy", "sharded_state"):
    assert refused(load_format=load_format) == (
        f"a codecllm container is read by --load-format auto, got {load_format}"
    )
assert "got 'int8', expected resident 'dense'" in refused(
    model_loader_extra_config={"resident": "int8"}
)
assert "not a value of workers, got '2'" in refused(model_loader_extra_config={"workers": "2"})
assert "Unexpected extra config keys" in refused(model_loader_extra_config={"wokers": 2})
config = sglang_plugin.CodecLLMConfig.from_config({})
try:
    config.get_quant_method(None, "model.layers.0.mlp")
except UsageError as exc:
    assert "read by codecllm's own loader alone, got model.layers.0.mlp" in str(exc)
else:
    raise AssertionError
print("registered")
"""


@needs_sglang
def test_sglang_finds_the_plug_in_and_takes_its_loader_for_containers_alone():
    done = run(["-c", _TWICE])
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.endswith("registered\n")
