"""A class of the user's own keeps the heads beside its base model, in every residency."""

from __future__ import annotations

import torch
import transformers

from codecllm.converter import convert
from codecllm.loader import from_pretrained
from codecllm.loader.hf import model_class
from tests.integration import tiny_models


class WithExtraHead(transformers.LlamaForCausalLM):
    """A class of the user's own with a head that training saved beside the base model."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.ModuleDict({"trained": torch.nn.Linear(64, 128)})
        self.post_init()


def test_a_class_with_extra_heads(tmp_path, monkeypatch):
    # Of the module that the loader has: transformers' own import of its processors makes another
    # module of that name, so the one that a test has need not be the same.
    monkeypatch.setattr(model_class.transformers, "WithExtraHead", WithExtraHead, raising=False)
    source = tiny_models.save(
        tmp_path / "source", WithExtraHead(transformers.LlamaConfig(**tiny_models.GROUPED))
    )
    convert(source, tmp_path / "c", scheme="int8", include=("*",))
    dense = from_pretrained(tmp_path / "c")
    assert type(dense) is WithExtraHead
    inputs = torch.ones(1, 64, dtype=torch.bfloat16)
    for resident in ("int8", "compressed"):
        model = from_pretrained(tmp_path / "c", resident=resident)
        torch.testing.assert_close(
            model.extra["trained"](inputs), dense.extra["trained"](inputs), rtol=0.02, atol=0.02
        )
