"""A config does not choose code of a repository for attention or experts; a caller may."""

from __future__ import annotations

import json

import pytest
import transformers as hf

import codecllm
from codecllm.formats.errors import UnsafePathError
from codecllm.loader.hf.folder import read_config
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.hf.quantizer import register
from codecllm.loader.hf.side_limits import check_config_document
from tests.tampering import copy_of, replace_listed

NAMED = [
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel@main:f"},
    {"experts_implementation": "evil/kernel"},
    {"attn_implementation": {"": "sdpa", "text_config": "paged|evil/kernel"}},
    {"text_config": {"_experts_implementation": "evil/kernel"}},
    {"_attn_implementation_internal": "evil/kernel"},
    {"text_config": {"_experts_implementation_internal": {"x": "evil/kernel"}}},
]
RENAMED = [
    {"attribute_map": {"zz": "_attn_implementation"}, "zz": "evil/kernel"},
    {"attribute_map": {"zz": "attn_implementation"}},
    {"attribute_map": {"zz": {"zz": ["_experts_implementation_internal"]}}},
    {"text_config": {"attribute_map": {"zz": "_name_or_path"}}},
    {"attribute_map": {"zz": "num_labels"}, "zz": 10**9},
    {"attribute_map": {"zz": "auto_map"}, "zz": {"AutoModel": "evil/repo--m.Evil"}},
    {"configuration_files": ["config.5.0.0.json"]},
    {"text_config": {"configuration_files": ["config.5.0.0.json"]}},
]


def _changed(container, folder, change):
    copy_of(container, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    replace_listed(folder, "config.json", json.dumps(config).encode())
    return folder


@pytest.mark.parametrize("change", NAMED, ids=str)
def test_a_config_that_names_a_repository_is_refused(container, tmp_path, change):
    folder = _changed(container, tmp_path / "c", change)
    with pytest.raises(UnsafePathError, match=r"^config\.json: \w+ names code of a repository"):
        codecllm.from_pretrained(folder)
    (folder / "codecllm.json").unlink()  # a source model, which is loaded to record a baseline
    with pytest.raises(UnsafePathError, match=r"names code of a repository"):
        load_plain(folder)


@pytest.mark.parametrize("change", RENAMED, ids=str)
def test_nothing_leads_around_the_checks(container, tmp_path, change):
    other = json.dumps({"model_type": "llama", "attn_implementation": "evil/kernel"})
    folder = _changed(container, tmp_path / "c", change)
    (folder / "config.5.0.0.json").write_text(other)
    message = r"^config\.json: \w+ leads transformers to other (attributes|files) than those"
    with pytest.raises(UnsafePathError, match=message):
        codecllm.from_pretrained(folder)
    with pytest.raises(UnsafePathError, match=message):  # whatever the caller chooses
        codecllm.from_pretrained(folder, attn_implementation="eager")
    (folder / "codecllm.json").unlink()
    with pytest.raises(UnsafePathError, match=message):
        load_plain(folder)


def test_the_caller_chooses(container, tmp_path):
    folder = _changed(container, tmp_path / "c", NAMED[0])
    model = codecllm.from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UnsafePathError):
        codecllm.from_pretrained(folder, experts_implementation="eager")
    assert read_config(folder, attn_implementation="mine/kernel") is not None


@pytest.mark.parametrize("reader", [hf.AutoConfig, hf.AutoModel, hf.LlamaForCausalLM])
def test_classes_of_transformers_refuse_it_too(container, tmp_path, reader):
    register()
    folder = _changed(container, tmp_path / "c", NAMED[0])
    with pytest.raises(UnsafePathError, match=r"names code of a repository"):
        reader.from_pretrained(folder)
    assert reader.from_pretrained(folder, attn_implementation="eager") is not None


def test_other_names_pass(container, tmp_path):
    change = {"attn_implementation": "eager", "_name_or_path": "user/name"}
    folder = _changed(container, tmp_path / "c", change)
    assert codecllm.from_pretrained(folder).config._attn_implementation == "eager"


@pytest.mark.parametrize("change", [NAMED[0], RENAMED[0]], ids=str)
def test_transformers_itself_would_take_the_name(container, tmp_path, change):
    """Guards the tests above: the entries of a config are ones that transformers obeys."""
    folder = _changed(container, tmp_path / "c", change)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert hf.AutoConfig.from_pretrained(folder)._attn_implementation == "evil/kernel"


ELSEWHERE = [
    {"backbone": "evil/bb"},
    {"backbone": "evil/bb", "backbone_config": None, "use_timm_backbone": True},
    {"text_config": {"parts": [{"model_type": "dpt", "backbone": "evil/bb"}]}},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf_hub:evil/bb"}},
    {"vision_config": {"model_type": "timm_wrapper", "architecture": "local-dir:/tmp/evil"}},
]


@pytest.mark.parametrize("change", ELSEWHERE, ids=str)
def test_a_backbone_elsewhere_is_refused(container, tmp_path, change):
    """transformers asks the Hub for its config while it reads this one."""
    register()
    folder = _changed(container, tmp_path / "c", change)
    message = r"^config\.json: (backbone|architecture) names a model elsewhere"
    for read in (codecllm.from_pretrained, hf.AutoModel.from_pretrained):
        with pytest.raises(UnsafePathError, match=message):
            read(folder)
    (folder / "codecllm.json").unlink()
    with pytest.raises(UnsafePathError, match=message):
        load_plain(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "resnet50"},
        {"backbone": "evil/bb", "backbone_config": {"model_type": "resnet"}},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "timm/resnet18.a1_in1k"}},
        {"model_type": "of-code", "backbone": "user/bb"},
    ],
    ids=str,
)
def test_backbones_of_timm_and_of_code_are_left(change):
    check_config_document({"model_type": "llama"} | change)
