"""A container with a tokenizer of sixty words."""

from __future__ import annotations

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import codecllm
from tests.integration import tiny_models


@pytest.fixture(scope="session")
def container(tmp_path_factory):
    """A container that lists config.json, tokenizer.json and tokenizer_config.json."""
    base = tmp_path_factory.mktemp("worded")
    source = tiny_models.llama(base / "source")
    vocabulary = {f"w{number}": number for number in range(60)} | {"[UNK]": 60}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").unlink(missing_ok=True)
    codecllm.convert(source, base / "out")
    return base / "out"
