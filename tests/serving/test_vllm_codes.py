"""Codes stay 8 bits in vLLM's memory: what is served is the dense model within its rounding."""

from __future__ import annotations

import pytest

from tests.serving.engine import IDS, PICTURES, TINY_MODELS, distance, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(900),
]
CODES = {"model_loader_extra_config": {"resident": "int8"}}


def _closely(served, expected, within):
    """Compares log-probabilities, and tokens up to the first one that was nearly another."""
    assert distance(served, expected) < within
    for one, other in zip(served, expected, strict=True):
        assert one["ids"][0] == other["ids"][0]


@pytest.mark.model
@pytest.mark.parametrize(("scheme", "layers"), [("int8", 122), ("bits5", 122)])
def test_a_real_model(engine, made, scheme, layers):
    container, _ = made("smollm2", scheme)
    answer = engine.ask(container, **CODES)
    _closely(answer["outputs"], engine.outputs(container), 0.5)
    assert "Paris" in answer["outputs"][0]["text"]
    kinds = list(answer["dtypes"].values())
    assert kinds.count("torch.int8") == layers - 1  # the head is tied to the embedding
    assert f"{layers} layers keep their codes or are packed" in engine.log.read_text()


@pytest.mark.parametrize(("name", "scheme"), TINY_MODELS)
def test_tiny_models(engine, made, name, scheme):
    container, _ = made(name, scheme)
    answer = engine.ask(container, IDS, **CODES)
    assert "outputs" in answer, answer
    _closely(answer["outputs"], engine.outputs(container, IDS), 0.25)
    assert "torch.int8" in answer["dtypes"].values()


def test_a_model_that_sees(engine, made):
    container, _ = made("idefics3", "all_int8")
    answer = engine.ask(container, PICTURES, max_model_len=64, **CODES)
    assert "outputs" in answer, answer
    _closely(answer["outputs"], engine.outputs(container, PICTURES, max_model_len=64), 0.25)
    coded = [name for name, kind in answer["dtypes"].items() if kind == "torch.int8"]
    assert any("vision" in name for name in coded)
    assert any("text_model" in name or "language" in name for name in coded)


def test_in_float32_products_are_those_of_dense_weights(engine, made):
    container, _ = made("qwen2", "mixed")
    options = {"dtype": "float32"}
    served = engine.outputs(container, IDS, **options, **CODES)
    assert distance(served, engine.outputs(container, IDS, **options)) < 1e-4


@pytest.mark.parametrize("scheme", ["all_int8", "mixed_experts"])
def test_experts(engine, made, scheme):
    container, _ = made("qwen3_moe", scheme)
    answer = engine.ask(container, IDS, dtype="float32", **CODES)
    assert "outputs" in answer, answer
    assert distance(answer["outputs"], engine.outputs(container, IDS, dtype="float32")) < 1e-4
    kinds = {name.rpartition(".")[2]: kind for name, kind in answer["dtypes"].items()}
    assert kinds["w13_weight"] == kinds["w2_weight"] == "torch.int8"
    assert ("w2_weight_col_scale" in kinds) == (scheme == "mixed_experts")


def test_experts_that_are_not_all_codes(engine, made):
    container, _ = made("qwen3_moe", "some_experts")
    answer = engine.ask(container, IDS, **CODES)
    _closely(answer["outputs"], engine.outputs(container, IDS), 0.25)
    kinds = {name.rpartition(".")[2]: kind for name, kind in answer["dtypes"].items()}
    assert kinds["w13_weight"] == "torch.bfloat16"


def test_compiled(engine, made):
    """The same folder, dense and with codes: compiled code of one is no code for the other."""
    container, _ = made("llama", "mixed")
    answers = [
        engine.ask(container, IDS, enforce_eager=False, **options) for options in (CODES, {})
    ]
    served, dense = (answer["outputs"] for answer in answers)
    _closely(served, dense, 0.25)
    assert answers[0]["hash"] != answers[1]["hash"]


PACKED = {"model_loader_extra_config": {"resident": "packed"}}


@pytest.mark.parametrize(
    ("name", "scheme", "dtype", "within"),
    [
        ("llama_alias", "mixed", "bfloat16", 0.25),
        ("phi3", "lossless", "bfloat16", 0.25),
        ("qwen2", "lossless", "bfloat16", 0.25),
        # In float32 products are those of dense weights.
        ("qwen2", "mixed", "float32", 1e-4),
    ],
)
def test_packed(engine, made, name, scheme, dtype, within):
    container, _ = made(name, scheme)
    answer = engine.ask(container, IDS, dtype=dtype, **PACKED)
    assert "outputs" in answer, answer
    _closely(answer["outputs"], engine.outputs(container, IDS, dtype=dtype), within)
    assert "layers keep their codes or are packed" in engine.log.read_text()


def test_packed_experts_keep_codes(engine, made):
    container, _ = made("qwen3_moe", "mixed_experts")
    answer = engine.ask(container, IDS, dtype="float32", **PACKED)
    assert "outputs" in answer, answer
    assert distance(answer["outputs"], engine.outputs(container, IDS, dtype="float32")) < 1e-4
    kinds = {name.rpartition(".")[2]: kind for name, kind in answer["dtypes"].items()}
    assert kinds["w13_weight"] == "torch.int8"


def test_packed_and_compiled(engine, made):
    container, _ = made("llama", "lossless")
    answer = engine.ask(container, IDS, enforce_eager=False, **PACKED)
    assert "outputs" in answer, (answer, engine.log.read_text()[-3000:])
    _closely(answer["outputs"], engine.outputs(container, IDS), 0.25)


def test_a_lossless_container_has_no_codes(engine, made):
    answer = engine.ask(made("llama", "lossless")[0], IDS, **CODES)
    assert answer["error"] == "UsageError"
    assert "needs an int8 container" in answer["message"]


def test_an_unknown_residency(engine, made):
    extra = {"resident": "int4"}
    answer = engine.ask(made("llama", "all_int8")[0], IDS, model_loader_extra_config=extra)
    assert answer["message"] == (
        "not a value of resident, got 'int4', expected dense, int8, packed"
    )
