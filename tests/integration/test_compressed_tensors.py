"""The compressed-tensors export gives the container's logits in transformers."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import codecllm
from codecllm import api
from codecllm.api import export
from codecllm.converter import ParamsChoice, convert
from codecllm.converter.plan.params import next_bf16
from codecllm.formats.container import Container
from codecllm.formats.errors import NotAContainerError, UsageError
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.reference import read_run_codes, runs
from tests.integration import tiny_models
from tests.stepped import row_steps

TOKENS = torch.arange(1, 33)[None]
NOT = ("*norm*", "*mlp.gate.*")


@pytest.fixture
def package():
    pytest.importorskip(
        "compressed_tensors",
        reason="the package compressed-tensors is not installed (extra 'test')",
    )


def largest_code(tensor):
    tiles = (codes for run in runs(tensor) for codes in read_run_codes(tensor, run))
    return max(int(abs(codes).max()) for codes in tiles)


def logits(model):
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits.float()


def load(folder, dtype, **options):
    with warnings.catch_warnings(
        action="ignore"
    ):  # transformers: an option given beside the model's own block
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("name", "dtype", "packed"),
    [
        ("llama", torch.bfloat16, 14),
        ("llama_untied", torch.float16, 15),
        ("qwen3", torch.bfloat16, 15),
        ("gemma3", torch.bfloat16, 14),
    ],
)
def test_dequantized_at_load_it_is_bit_for_bit_ours(
    package, tiny, container, tmp_path, name, dtype, packed
):
    from transformers import CompressedTensorsConfig

    export(container(name, "int8"), tmp_path / "packed", format="compressed-tensors")
    theirs = load(
        tmp_path / "packed", dtype, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    ours = codecllm.from_pretrained(container(name, "int8"), dtype=dtype)
    assert torch.equal(logits(theirs), logits(ours))
    weights = ours.state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, weights[key]), key
    index = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    modules = {key for key, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(modules - set(index["ignore"])) == packed


def test_experts_are_ours_before_their_rounding(package, tiny, container, tmp_path):
    """The package leaves experts in float32: exactly code * scale, which we round to bfloat16."""
    from transformers import CompressedTensorsConfig

    export(container("qwen3_moe", "int8"), tmp_path / "packed", format="compressed-tensors")
    theirs = load(
        tmp_path / "packed",
        torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    ours = codecllm.from_pretrained(container("qwen3_moe", "int8"), dtype=torch.bfloat16)
    weights = ours.state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), weights[key]), key
    largest = float(logits(ours).abs().max())
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=2**-7 * largest)


def test_kept_packed_it_is_ours_where_the_dtype_holds_the_scales(package, tmp_path):
    """Packed weights have scales in the model's dtype: exact in float32, rounded in bfloat16."""
    source = tiny_models.llama(tmp_path / "source", dtype=torch.float32)
    convert(source, tmp_path / "out", include=("*",))
    export(tmp_path / "out", tmp_path / "packed", format="compressed-tensors")
    theirs = load(tmp_path / "packed", torch.float32)
    assert theirs.model.layers[0].mlp.up_proj.weight_packed.dtype == torch.int32
    ours = logits(codecllm.from_pretrained(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-6)
    rounded = logits(load(tmp_path / "packed", torch.bfloat16))
    ours = logits(codecllm.from_pretrained(tmp_path / "out", dtype=torch.bfloat16))
    torch.testing.assert_close(rounded, ours, rtol=2**-7, atol=2**-7 * float(ours.abs().max()))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("width", range(2, 9))
def test_codes_of_every_width(package, tiny, tmp_path, name, width):
    """Steps of type BF16, as `--bits` makes them, are kept by packed models too."""
    from transformers import CompressedTensorsConfig

    choice = ParamsChoice(row_steps((1 << (width - 1)) - 1, next_bf16))
    convert(tiny(name), tmp_path / "out", include=("*.weight",), exclude=NOT, choice=choice)
    report = export(tmp_path / "out", tmp_path / "packed", format="compressed-tensors")
    assert report.notes[0].endswith(f"have {width} bits a code")
    ours = codecllm.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    weights = ours.state_dict()
    config = CompressedTensorsConfig(dequantize=True)
    theirs = load(tmp_path / "packed", torch.bfloat16, quantization_config=config)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value.to(torch.bfloat16), weights[key]), key
    if name == "qwen3":
        packed = load(tmp_path / "packed", torch.bfloat16)
        assert packed.model.layers[0].mlp.up_proj.weight_packed.dtype == torch.int32
        assert torch.equal(logits(packed), logits(ours))


@pytest.mark.parametrize("refine", [False, True])
def test_a_container_with_a_rate(package, tiny, tmp_path, refine):
    """Calibrated steps without scales of columns: the packed model is the container's, exactly."""
    api.convert(
        tiny("qwen3"),
        tmp_path / "out",
        bits=4,
        include=("*_proj.weight",),
        refine=refine,
        column_scales=False,
        baseline=False,
    )
    report = export(tmp_path / "out", tmp_path / "packed", format="compressed-tensors")
    assert report.notes[0].startswith("14 of 14 tensors")
    packed = load(tmp_path / "packed", torch.bfloat16)
    ours = codecllm.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits(packed), logits(ours))


@pytest.mark.parametrize(("width", "refine"), [(2, False), (4, False), (4, True), (7, False)])
def test_codes_of_a_width_that_is_asked_for(package, tiny, tmp_path, width, refine):
    """`code_bits` gives every linear layer codes of that width; the embedding keeps 8 bits."""
    api.convert(
        tiny("qwen3"),
        tmp_path / "out",
        code_bits=width,
        refine=refine,
        include=("*.weight",),
        exclude=NOT,
        baseline=False,
    )
    report = export(tmp_path / "out", tmp_path / "packed", format="compressed-tensors", width=width)
    assert report.notes[0].startswith("15 of 15 tensors")
    with Container(tmp_path / "out") as container:
        records = [one for one in container.records.values() if isinstance(one, Int8Tensor)]
        largest = {one.name: largest_code(container.tensor(one.name)) for one in records}
    embedding = largest.pop("model.embed_tokens.weight")
    assert embedding == 127
    assert set(largest.values()) == {(1 << (width - 1)) - 1}
    roundings = {one.rounding for one in records if one.name in largest}
    assert roundings == {"feedback" if refine else "nearest"}
    packed = load(tmp_path / "packed", torch.bfloat16)
    ours = codecllm.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits(packed), logits(ours))


def test_a_width_for_another_format(container, tmp_path):
    with pytest.raises(UsageError, match="width goes with format 'compressed-tensors'"):
        export(container("llama", "int8"), tmp_path / "plain", width=4)


def test_without_linear_int8_weights_there_is_nothing_to_export(container, tmp_path):
    with pytest.raises(UsageError, match="no int8 tensor"):
        export(container("gpt2", "int8"), tmp_path / "packed", format="compressed-tensors")
    with pytest.raises(UsageError, match="this container is lossless"):
        export(container("llama", "lossless"), tmp_path / "packed", format="compressed-tensors")
    with pytest.raises(UsageError, match="Q8_0 keeps its scales as float16"):
        export(container("llama", "int8"), tmp_path / "packed", format="gguf")
    with pytest.raises(UsageError, match="not a value of format"):
        export(container("llama", "int8"), tmp_path / "packed", format="onnx")
    with pytest.raises(NotAContainerError):
        export(tmp_path, tmp_path / "packed", format="gguf")
    assert not (tmp_path / "packed").exists()
