"""Classes of a part of a model (one tower), given the folder of the whole."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

from codecllm.converter import convert
from codecllm.formats.errors import ModelMismatchError
from codecllm.loader import from_pretrained
from codecllm.loader.hf.quantizer import CodecLLMQuantizer
from tests.integration import architectures
from tests.integration.outputs import same_bits
from tests.integration.tiny_models import save

TEXT = {
    key: value
    for key, value in architectures.VISION.items()
    if key not in ("image_size", "patch_size")
}


def _siglip(folder):
    text = {**TEXT, "vocab_size": 512, "max_position_embeddings": 64}
    config = hf.SiglipConfig(text_config=text, vision_config=architectures.VISION)
    return save(folder, hf.SiglipModel(config), dtype=torch.float16)


def _clip(folder):
    return architectures.make("clip", folder)


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (_clip, hf.CLIPTextModel),
        (_clip, hf.CLIPVisionModel),
        (_siglip, hf.SiglipTextModel),
        (_siglip, hf.SiglipVisionModel),
    ],
    ids=lambda value: value.__name__,
)
def test_a_tower_of_a_container_is_that_of_the_source(tmp_path, make, part, scheme):
    make(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "c", scheme=scheme, include=("*",))
    expected = part.from_pretrained(tmp_path / "source")
    dense = from_pretrained(tmp_path / "c", auto_class=part)
    names = dense.state_dict().keys()
    assert names == expected.state_dict().keys()
    loads = [dense, part.from_pretrained(tmp_path / "c")]
    loads.append(from_pretrained(tmp_path / "c", auto_class=part, resident="compressed"))
    for model in loads:
        assert type(model.config) is type(expected.config)
        for name in names:
            value, plain = model.state_dict()[name] + 0, expected.state_dict()[name]
            assert same_bits(value, dense.state_dict()[name])
            if scheme == "lossless":
                assert same_bits(value, plain)
            else:
                torch.testing.assert_close(value, plain, rtol=0.02, atol=0.01)


def test_a_tower_is_saved_without_our_block(tmp_path):
    convert(_clip(tmp_path / "source"), tmp_path / "c", scheme="int8")
    model = hf.CLIPTextModel.from_pretrained(tmp_path / "c")
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = hf.CLIPTextModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(same_bits(again[name], value) for name, value in model.state_dict().items())


def test_the_block_of_a_part_keeps_the_parts_own():
    ours, own = {"quant_method": "codecllm", "scheme": "lossless"}, {"quant_method": "fp8"}
    assert CodecLLMQuantizer.block_of_part(ours, None) == ours
    assert CodecLLMQuantizer.block_of_part(ours, own) == {
        **ours,
        "original_quantization_config": own,
    }
    assert CodecLLMQuantizer.block_of_part(own, None) is None
    assert CodecLLMQuantizer.block_of_part(None, own) is None


@pytest.mark.parametrize("resident", ["dense", "compressed"])
def test_a_class_that_finds_none_of_its_weights_is_an_error(container, resident):
    """transformers gives a model at random, with a warning.

    It does so for question answering with Llama too: that class has another prefix.
    """
    for auto_class in (hf.GPT2LMHeadModel, hf.LlamaForQuestionAnswering):
        with pytest.raises(
            ModelMismatchError, match=r"\w+ finds none, or less than half, of its weights"
        ):
            from_pretrained(
                container("llama", "lossless"), auto_class=auto_class, resident=resident
            )
    with pytest.raises(
        ModelMismatchError, match="BertModel finds none, or less than half, of its weights"
    ):
        hf.BertModel.from_pretrained(container("llama", "lossless"))
