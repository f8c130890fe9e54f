"""What reads a model's files asks no Hub, whatever name of a repository a setting may be."""

from __future__ import annotations

import json
import threading
from contextlib import suppress

import pytest
import transformers as hf
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils.hub import hf_api

from codecllm.formats.errors import UnsafePathError
from codecllm.hub import no_requests
from codecllm.loader import from_pretrained
from codecllm.loader.hf.folder import read_config, read_tokenizer
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.hf.quantizer import register
from tests.integration import tiny_models
from tests.tampering import replace_listed

REPO = "evil/model"


@pytest.fixture
def asked(hub, monkeypatch):
    """A repository on the Hub, and what the Hub was asked."""
    monkeypatch.setattr(hf_api(), "endpoint", hub.url)
    hub.add_repo(REPO, {"config.json": b'{"model_type": "llama"}'})
    return hub.log


@pytest.mark.parametrize(
    "ask",
    [
        lambda name: HfApi().model_info(name),
        lambda name: hf_api().list_repo_files(name),
        hf.AutoConfig.from_pretrained,
        hf.AutoTokenizer.from_pretrained,
        hf.AutoModel.from_pretrained,
    ],
)
def test_nothing_is_sent(asked, ask):
    message = r"^x would ask the Hub for what is not in the model's folder, got .*evil/model"
    with pytest.raises(UnsafePathError, match=message), no_requests("x"):
        ask(REPO)
    assert not asked
    assert HfApi().model_info(REPO).id == REPO  # behind the block


def test_a_repository_is_none(asked):
    with no_requests("x"), no_requests("y"):
        assert not HfApi().repo_exists(REPO)
    assert not asked
    assert HfApi().repo_exists(REPO)


def test_other_errors_pass(asked):
    """Those that have nothing to do with the request that was not sent."""
    with pytest.raises(LookupError), no_requests("x"):
        {}[HfApi().repo_exists(REPO)]


def test_other_threads_may_ask(asked):
    found = []
    with no_requests("x"):
        thread = threading.Thread(target=lambda: found.append(HfApi().repo_exists(REPO)))
        thread.start()
        thread.join()
    assert found == [True]


def _asking(original):
    """A function of transformers that asks for another repository by the way."""

    def ask(*args, **kwargs):
        HfApi().model_info(REPO)
        return original(*args, **kwargs)

    return ask


READERS = {
    "config": (hf.PreTrainedConfig, "from_dict", read_config),
    "tokenizer": (hf.PreTrainedTokenizerBase, "_from_pretrained", read_tokenizer),
    "generation settings": (hf.GenerationConfig, "from_dict", from_pretrained),
    "model": (hf.LlamaForCausalLM, "__init__", from_pretrained),
    "plain model": (hf.LlamaForCausalLM, "__init__", load_plain),
}


@pytest.mark.parametrize("part", READERS)
def test_readers_send_nothing(asked, container, monkeypatch, part):
    cls, name, read = READERS[part]
    if part == "plain model":
        container = tiny_models.llama(container.parent / "source")
    original = getattr(cls, name)
    monkeypatch.setattr(cls, name, _asking(original))
    with pytest.raises(UnsafePathError, match="would ask the Hub"):
        read(container)
    assert not asked


def test_a_name_of_timm_is_not_asked_for(asked, container):
    config = {"model_type": "detr", "backbone": "resnet50", "backbone_kwargs": {"in_chans": 3}}
    replace_listed(container, "config.json", json.dumps(config).encode())
    assert read_config(container).backbone_config.model_type == "timm_backbone"
    assert not asked


@pytest.mark.parametrize("reader", [hf.AutoConfig, hf.DetrConfig, hf.DetrModel])
def test_classes_of_transformers_send_nothing_for_a_container(asked, container, reader):
    """Whatever the name of the model's type is, for a class that is given by name."""
    register()
    config = json.loads((container / "config.json").read_bytes())
    config |= {"model_type": "detr" if reader is hf.AutoConfig else "x", "backbone": "evil"}
    config |= {"backbone_config": None, "use_timm_backbone": False}
    replace_listed(container, "config.json", json.dumps(config).encode())
    with suppress(ImportError):  # the model needs timm
        reader.from_pretrained(container)
    assert not asked
    del config["quantization_config"]
    (container / "config.json").write_text(json.dumps(config))
    with suppress(HfHubHTTPError):  # this Hub knows no names without an owner
        hf.DetrConfig.from_pretrained(container)
    assert asked  # of a plain model, which is not ours
