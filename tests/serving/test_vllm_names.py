"""The names of vLLM that the plug-in uses: this test fails where one of them moves."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from codecllm.serving import vllm_plugin
from tests.serving.engine import ONE_PROCESS, ROOT, variables, why_not
from tests.serving.environment import VERSION
from tests.serving.module_imports import files_that_import

needs_vllm = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_one_file_names_vllm():
    assert files_that_import("vllm") == ["vllm_names.py"]


def _run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables(tmp_path, ONE_PROCESS),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


_NAMES = """
import inspect
from types import SimpleNamespace
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import FusedMoEConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import WeightsMapper
from codecllm.serving import vllm_names as names

def parameters(function):
    return list(inspect.signature(function).parameters)

assert parameters(EngineArgs.create_model_config) == ["self"]
source = inspect.getsource(EngineArgs.create_engine_config)
assert source.index("self.create_model_config()") < source.index("self.create_load_config()")
assert "load_format" in inspect.signature(EngineArgs).parameters
assert parameters(DefaultModelLoader.get_all_weights) == ["self", "model_config", "model"]
assert parameters(DefaultModelLoader.load_weights) == ["self", "model", "model_config"]
assert parameters(DefaultModelLoader._get_weights_iterator) == ["self", "source"]
assert parameters(names.should_skip_weight)[:2] == ["weight_name", "local_expert_ids"]
loader = DefaultModelLoader(names.LoadConfig())
assert loader.local_expert_ids is None and loader.enable_weights_track is None
assert loader.counter_before_loading_weights == 0
assert "additional_config" in names.VllmConfig.__dataclass_fields__
assert not names.is_elsewhere(loader, "model.layers.0.mlp.experts.3.up_proj.weight")
assert names.QuantizationConfig.online_quantization_config is None
methods = names.FusedMoEMethodBase
assert parameters(methods.create_weights)[1:6] == [
    "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype"
]
assert parameters(methods.apply)[1:] == [
    "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"
]
experts = names.RoutedExperts
assert parameters(experts._map_global_expert_id_to_local_expert_id) == ["self", "expert_id"]
assert parameters(experts.weight_loader)[1:] == [
    "param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success"
]
assert isinstance(experts.expert_map, property)
mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model.", "skip.": None})
assert names.new_name_of(mapper)("model.norm.weight") == "language_model.model.norm.weight"
assert names.new_name_of(mapper)("skip.norm.weight") is None
mapper = SimpleNamespace(_map_name=mapper.map_name)
assert names.new_name_of(mapper)("model.norm.weight") == "language_model.model.norm.weight"
assert "in_dtype" in inspect.get_annotations(FusedMoEConfig)
assert names.platform_device().type == "cpu"
loader.local_expert_ids = {0, 1}
assert names.is_elsewhere(loader, "model.layers.0.mlp.experts.3.up_proj.weight")
assert not names.is_elsewhere(loader, "model.layers.0.mlp.experts.1.up_proj.weight")
"""


@needs_vllm
def test_every_name_is_where_it_was(tmp_path):
    _run(_NAMES, tmp_path)


_TWICE = """
import logging, sys
from vllm.engine.arg_utils import EngineArgs
from codecllm.serving.vllm_plugin import register

register()
first = EngineArgs.create_model_config
register()
assert EngineArgs.create_model_config is first
assert "codecllm.loader" not in sys.modules
print("registered")
"""


@needs_vllm
def test_registering_twice_changes_nothing_and_imports_no_loader(tmp_path):
    assert _run(_TWICE, tmp_path).endswith("registered\n")


def test_the_entry_point_names_the_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {
        "codecllm": "codecllm.serving.vllm_plugin:register"
    }
    (extra,) = project["optional-dependencies"]["vllm"]
    assert Requirement(extra).specifier.contains(VERSION)
    assert list(inspect.signature(vllm_plugin.register).parameters) == []
