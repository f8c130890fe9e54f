"""The rules that choose a scheme for each tensor, and the block that they add to the config."""

from __future__ import annotations

import json

import numpy as np
import pytest

from codecllm.converter import ConvertOptions, convert
from codecllm.converter.plan.policy import channel_axis
from codecllm.formats import BASE_VERSION
from codecllm.formats.errors import UsageError
from tests.sources import bf16, write_source

BIG, SMALL = (256, 256), (255, 256)


def _schemes(tmp_path, shapes, config=None, **options):
    rng = np.random.default_rng(0)
    tensors = {
        name: ("BF16", bf16(rng.standard_normal(shape)).reshape(shape))
        for name, shape in shapes.items()
    }
    out = tmp_path / "out"
    report = convert(write_source(tmp_path / "source", tensors, config), out, force=True, **options)
    return {record.name: record.scheme for record in report.manifest.tensors}


def test_default_choice(tmp_path):
    kept = [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.router.weight",
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "transformer.wpe.weight",
    ]
    quantized = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    schemes = _schemes(
        tmp_path,
        dict.fromkeys(kept + quantized, BIG) | {"small.weight": SMALL, "norm.weight": (70_000,)},
    )
    assert {name for name, scheme in schemes.items() if scheme == "int8"} == set(quantized)
    assert {schemes[name] for name in [*kept, "small.weight"]} == {"lossless"}
    assert schemes["norm.weight"] == "raw"


def test_include_and_exclude(tmp_path):
    shapes = {
        "a.weight": BIG,
        "b.weight": BIG,
        "small.weight": SMALL,
        "c.gate.weight": BIG,
        "norm": (512,),
    }
    schemes = _schemes(tmp_path, shapes, include=("small*", "*.gate.*", "norm"), exclude=("b.*",))
    assert schemes == {
        "a.weight": "int8",
        "b.weight": "lossless",
        "small.weight": "int8",
        "c.gate.weight": "int8",
        "norm": "raw",
    }


def test_exclude_wins(tmp_path):
    assert _schemes(tmp_path, {"a": BIG}, include=("a",), exclude=("a",)) == {"a": "lossless"}


@pytest.mark.parametrize("patterns", ["lm_head*", b"a", 5, None, [1], [["a"]], [b"a"]])
@pytest.mark.parametrize("name", ["include", "exclude"])
def test_patterns_that_are_no_list_of_strings_are_refused(name, patterns):
    """A string is a sequence too: each letter would be a pattern, and the star all tensors."""
    with pytest.raises(UsageError, match=f"not a value of {name}, got"):
        ConvertOptions(**{name: patterns})


def test_patterns_are_read_once():
    assert ConvertOptions(include=(name for name in ["a", "b"])).include == ("a", "b")


@pytest.mark.parametrize("name", ["chunk_kib", "max_shard_bytes"])
@pytest.mark.parametrize("number", ["64", 64.0, True, None])
def test_sizes_that_are_no_integers_are_refused(name, number):
    with pytest.raises(UsageError, match=f"not a value of {name}, got"):
        ConvertOptions(**{name: number})


def test_pattern_that_matches_nothing_is_a_warning(tmp_path):
    source = write_source(tmp_path / "source", {"a": ("F32", np.ones((4, 4), np.float32))})
    report = convert(source, tmp_path / "out", exclude=("nothing*",))
    assert any("nothing*" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("name", "shape", "model_type", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 4), "llama", (0, "row")),
        ("h.0.attn.c_attn.weight", (4, 12), "gpt2", (1, "column")),
        ("transformer.h.0.mlp.c_proj.weight", (16, 4), "gpt2", (1, "column")),
        ("h.0.attn.c_attn.weight", (4, 12), "llama", (0, "row")),
        ("wte.weight", (50, 4), "gpt2", (0, "row")),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 16, 8), "qwen3_moe", (1, "row")),
    ],
)
def test_channel_axis(name, shape, model_type, expected):
    assert channel_axis(name, shape, model_type) == expected


def test_config_is_the_sources_with_one_block_more(tmp_path):
    config = {"model_type": "x", "odd": [1, {"ü": None}], "num_local_experts": 4}
    source = write_source(tmp_path / "source", {"a": ("F32", np.ones((4, 4), np.float32))}, config)
    convert(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    block = written.pop("quantization_config")
    assert written == config
    assert (block["quant_method"], block["format_version"], block["scheme"]) == (
        "codecllm",
        BASE_VERSION,
        "int8",
    )
