"""A panic of the tokenizers' library is one error of ours: it is no Exception of Python."""

from __future__ import annotations

import pytest

from codecllm.formats.errors import SchemaError
from codecllm.loader.hf import folder as folder_module
from codecllm.loader.hf.folder import decoded, encoded, read_tokenizer
from codecllm.verifier.baseline.model_output import PromptCoder


class PanicException(BaseException):
    """As PyO3 names it."""


class Panicking:
    bos_token_id = None

    def __call__(self, text, **options):
        raise PanicException("index out of bounds")

    def decode(self, ids, **options):
        raise PanicException("index out of bounds")


@pytest.mark.parametrize("call", [lambda t: encoded(t, "a"), lambda t: decoded(t, [1])])
def test_texts_and_tokens(call):
    with pytest.raises(SchemaError, match="the tokenizer panics: index out of bounds"):
        call(Panicking())


def test_other_exceptions_that_end_a_process_pass():
    def interrupted(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(interrupted, "a")


def test_reading_a_tokenizer(container, monkeypatch):
    import transformers

    def panic(*_, **__):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(SchemaError, match="panics"):
        read_tokenizer(container)


def test_a_baseline_runs_without_a_tokenizer_that_panics(container, monkeypatch):
    import json

    import transformers

    monkeypatch.setattr(folder_module, "read_tokenizer", lambda _: Panicking())
    config = transformers.AutoConfig.for_model(
        **json.loads((container / "config.json").read_text())
    )
    assert PromptCoder(container, config).encode("a text") == []
