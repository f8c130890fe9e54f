"""vLLM serves a container as it serves the plain model: the same tokens and probabilities."""

from __future__ import annotations

import pytest

from tests.serving.engine import IDS, PICTURES, PROMPTS, TINY_MODELS, distance, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]


@pytest.mark.model
@pytest.mark.parametrize("scheme", ["lossless", "int8", "bits5"])
def test_a_real_model_is_served_as_its_plain_form(engine, made, scheme):
    container, plain = made("smollm2", scheme)
    served, expected = engine.outputs(container), engine.outputs(plain)
    assert served == expected
    assert "Paris" in served[0]["text"]
    assert len(served) == len(PROMPTS)


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "lossless"), ("qwen3_moe", "lossless"), *TINY_MODELS]
)
def test_tiny_models_of_several_architectures(engine, made, name, scheme):
    container, plain = made(name, scheme)
    served = engine.outputs(container, IDS)
    assert served == engine.outputs(plain, IDS)


def test_another_dtype_is_rounded_once(engine, made):
    container, plain = made("llama", "all_int8")
    served = engine.outputs(container, IDS, dtype="float32")
    # The plain form was rounded to bfloat16 before.
    assert 0 < distance(served, engine.outputs(plain, IDS, dtype="float32")) < 0.1


@pytest.mark.parametrize("scheme", ["lossless", "all_int8"])
def test_a_model_that_sees(engine, made, scheme):
    container, plain = made("idefics3", scheme)
    served = engine.outputs(container, PICTURES, max_model_len=64)
    assert served == engine.outputs(plain, PICTURES, max_model_len=64)
