"""Quantized sources: kept bit for bit, or read as the weights that their codes stand for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from codecllm.converter import ConvertOptions, convert, estimate
from codecllm.converter.exports.export import export
from codecllm.converter.source import dequantized
from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import CodecLLMError, SourceError
from codecllm.formats.manifest.manifest import ORIGINAL_KEY
from codecllm.formats.reference import read_tensor_bytes
from codecllm.verifier.checks.comparison import check_source
from codecllm.verifier.report import Stage
from tests.converter.quantized_sources import DEQUANTIZED, KEPT
from tests.sources import bf16, write_source

OPAQUE = sorted(set(KEPT) - set(DEQUANTIZED))
MATRIX = ("BF16", bf16(np.random.default_rng(0).standard_normal((300, 256))))


def _write(tmp_path, name):
    tensors, config = KEPT[name]()
    return write_source(tmp_path / "source", tensors, config), tensors, config


def _config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("name", KEPT)
def test_lossless_keeps_every_bit_and_the_block(tmp_path, name, codec):
    source, tensors, config = _write(tmp_path, name)
    report = convert(source, tmp_path / "out", scheme="lossless", codec=codec)
    assert report.warnings == []
    with Container(tmp_path / "out") as container:
        assert set(container.records) == set(tensors)
        for key, (_, values) in tensors.items():
            assert read_tensor_bytes(container, key) == np.ascontiguousarray(values).tobytes(), key
        manifest = container.manifest
    method = (config.get("quantization_config") or config["text_config"]["quantization_config"])[
        "quant_method"
    ]
    assert manifest.source.quantization == method
    assert "quantized" in manifest.required_features
    written = _config(tmp_path / "out")
    assert written["quantization_config"].get(ORIGINAL_KEY) == config.get("quantization_config")
    assert written.get("text_config") == config.get("text_config")


@pytest.mark.parametrize("name", OPAQUE)
def test_int8_of_packed_codes_is_refused_with_a_way_out(tmp_path, name):
    source, _, _ = _write(tmp_path, name)
    with pytest.raises(SourceError, match="--scheme lossless keeps every bit") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.tensor is not None and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def _reference(tensors, config, name):
    """The weight as transformers dequantizes it, as bits of bfloat16."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    if f"{name}_blocks" in tensors:
        parts = (torch.from_numpy(tensors[f"{name}_{part}"][1]) for part in ("blocks", "scales"))
        weight = convert_moe_packed_tensors(*parts)
        return weight.view(torch.uint16).numpy()
    dtype, words = tensors[name]
    stored = torch.from_numpy(words)
    weight = stored.view(torch.float8_e4m3fn) if dtype == "F8_E4M3" else stored.float()
    suffix = "_scale_inv" if f"{name}_scale_inv" in tensors else "_scale"
    scale_dtype, scale_words = tensors[name + suffix]
    scale = torch.from_numpy(scale_words)
    scale = scale.view(torch.bfloat16) if scale_dtype == "BF16" else scale
    rows, cols = weight.shape
    down, across = scale.shape
    height, width = (128, 128) if suffix == "_scale_inv" else (1, cols)
    padded = torch.zeros(down * height, across * width)
    padded[:rows, :cols] = weight.float()
    result = Fp8Dequantize(None)._dequantize_one(padded, scale, torch.bfloat16)
    return result[:rows, :cols].contiguous().view(torch.uint16).numpy()


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_weights_are_those_that_transformers_dequantizes(tmp_path, name):
    source, tensors, config = _write(tmp_path, name)
    with SourceModel(source, view="int8") as model:
        checked = 0
        for tensor in model.tensors.values():
            assert tensor.dtype.name == "BF16"
            if tensor.name in tensors and tensors[tensor.name][0] == "BF16":
                continue
            expected = _reference(tensors, config, tensor.name)
            assert tensor.shape == expected.shape
            values = tensor.read_elements(0, tensor.entry.elements)
            np.testing.assert_array_equal(values.reshape(tensor.shape), expected)
            checked += 1
        assert checked == {"deepseek_fp8": 2, "gpt_oss_mxfp4": 2}.get(name, 1)
        assert not any("scale" in key for key in model.tensors)
        assert "quantization_config" not in model.config


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_reading_in_pieces_gives_the_same(tmp_path, name, monkeypatch):
    source, tensors, _ = _write(tmp_path, name)
    monkeypatch.setattr(dequantized, "_PIECE_ELEMENTS", 1000)
    rng = np.random.default_rng(1)
    with SourceModel(source, view="int8") as model:
        for tensor in model.tensors.values():
            if tensor.name in tensors and tensors[tensor.name][0] != "F8_E4M3":
                continue
            whole = tensor.read_elements(0, tensor.entry.elements)
            for _ in range(20):
                first, last = sorted(rng.integers(0, tensor.entry.elements + 1, 2).tolist())
                np.testing.assert_array_equal(tensor.read_elements(first, last), whole[first:last])
                data = tensor.read_bytes(2 * first + 1, 2 * last + 1)
                assert data == whole.tobytes()[2 * first + 1 : 2 * last + 1]


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_int8_of_dequantized_weights(tmp_path, name):
    source, tensors, _ = _write(tmp_path, name)
    report = convert(source, tmp_path / "out", include=("*proj*",))
    assert any("are read as bfloat16" in line for line in report.warnings)
    records = {record.name: record for record in report.manifest.tensors}
    assert any(record.scheme == "int8" and "layers.0" in key for key, record in records.items())
    assert report.manifest.source.quantization is None
    assert report.manifest.required_features == []
    assert report.manifest.source.tensor_bytes == sum(v.nbytes for _, v in tensors.values())
    assert ORIGINAL_KEY not in _config(tmp_path / "out")["quantization_config"]
    predicted = estimate(source, ConvertOptions(include=("*proj*",)))
    assert {one.name for one in predicted.tensors} == set(records)


def test_scales_of_other_types(tmp_path):
    """E8M0 exponents, one scale for all, bytes as exponents: each is a factor of its block."""
    weight = np.full((256, 256), 0x38, np.uint8)  # 1.0
    exponents = np.array([[127, 128], [126, 120]], np.uint8)
    expected = np.kron(2.0 ** (exponents.astype(float) - 127), np.ones((128, 128)))
    for dtype in ("F8_E8M0", "U8"):
        tensors = {"a.weight": ("F8_E4M3", weight), "a.weight_scale_inv": (dtype, exponents)}
        source = write_source(tmp_path / dtype, tensors)
        with SourceModel(source, view="int8") as model:
            words = model.tensors["a.weight"].read_elements(0, 256 * 256)
        values = (words.astype(np.uint32) << 16).view(np.float32).reshape(256, 256)
        np.testing.assert_array_equal(values, expected)
    one = {"a.weight": ("F8_E5M2", weight), "a.weight_scale": ("F32", np.array(2.0, np.float32))}
    with SourceModel(write_source(tmp_path / "one", one), view="int8") as model:
        words = model.tensors["a.weight"].read_elements(0, 4)
    assert words.tolist() == bf16(np.full(4, 1.0)).tolist()  # 0x38 is 0.5 in E5M2


def test_values_of_8_bit_floats_are_torchs():
    codes = torch.arange(256, dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        expected = codes.view(dtype).float().numpy()
        np.testing.assert_array_equal(dequantized._float8_values(DTYPES[name]), expected)


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 2), (5,), (0, 2)])
def test_scales_that_do_not_fit(tmp_path, shape):
    tensors = {
        "a.weight": ("F8_E4M3", np.full((256, 256), 0x38, np.uint8)),
        "a.weight_scale_inv": ("F32", np.ones(shape, np.float32)),
    }
    with pytest.raises(SourceError, match="scales do not fit") as caught:
        convert(write_source(tmp_path / "s", tensors), tmp_path / "out")
    assert caught.value.tensor == "a.weight_scale_inv"


# Blocks and names that mean nothing.


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_block_that_no_tensor_bears_out_is_dropped(tmp_path, scheme, part, method):
    block = {"quantization_config": {"quant_method": method}}
    config = {"model_type": "x", **({part: block | {"a": 1}} if part else block)}
    source = write_source(tmp_path / "s", {"a.weight": MATRIX}, config)
    report = convert(source, tmp_path / "out", scheme=scheme)
    assert any(f"{method}, but no tensor is quantized" in line for line in report.warnings)
    written = _config(tmp_path / "out")
    assert written["quantization_config"]["quant_method"] == "codecllm"
    assert ORIGINAL_KEY not in written["quantization_config"]
    assert written.get("text_config") == ({"a": 1} if part else None)
    assert report.manifest.source.quantization is None


@pytest.mark.parametrize(
    "name",
    [
        *("position_ids", "num_batches_tracked", "relative_position_index", "attn.bias"),
        *("token_type_ids", "gate.tid2eid", "attn_mask", "rel_indices"),
    ],
)
def test_integers_of_plain_models_bear_no_block_out(tmp_path, name):
    tensors = {"a.weight": MATRIX, f"b.{name}": ("I64", np.arange(512).reshape(1, 512))}
    config = {"model_type": "x", "quantization_config": {"quant_method": "gptq"}}
    source = write_source(tmp_path / "s", tensors, config)
    for scheme in ("lossless", "int8"):
        report = convert(source, tmp_path / scheme, scheme=scheme)
        assert report.manifest.source.quantization is None


def _with_blocks(tmp_path, quantization, shape=(192, 192), grid=(2, 2)):
    codes = np.full(shape, 0x38, np.uint8)  # 1.0 in E4M3
    scales = 2.0 ** np.arange(np.prod(grid), dtype=np.float32).reshape(grid)
    tensors = {"l.weight": ("F8_E4M3", codes), "l.weight_scale": ("F32", scales)}
    config = {"model_type": "x"}
    if quantization is not None:
        config["quantization_config"] = quantization
    return write_source(tmp_path / "s", tensors, config), scales


def _groups(*structures):
    groups = {
        f"group_{number}": {"targets": ["Linear"], "weights": {"block_structure": structure}}
        for number, structure in enumerate(structures)
    }
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize(
    "quantization",
    [
        _groups([128, 128]),
        _groups("128x128"),
        _groups([128, 128], [64, 64]),
        _groups([128, 128], ["a", 96], [0, 96], [96.0, 96], 96, None, [96]),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [True, 96]},
        None,
    ],
)
def test_blocks_whose_last_one_is_short(tmp_path, quantization):
    """192 rows in two blocks are 128 and 64, although 96 divides them."""
    source, scales = _with_blocks(tmp_path, quantization)
    with SourceModel(source, view="int8") as model:
        tensor = model.tensors["l.weight"]
        words = tensor.read_elements(0, tensor.entry.elements).astype(np.uint32) << 16
    expected = scales.repeat(128, 0).repeat(128, 1)[:192, :192]
    np.testing.assert_array_equal(words.view(np.float32).reshape(192, 192), expected)


@pytest.mark.parametrize(
    ("quantization", "shape", "grid"),
    [
        (_groups([128, 128], [96, 96]), (192, 192), (2, 2)),
        (_groups([64, 64]), (192, 192), (2, 2)),
        ({"quant_method": "fp8"}, (300, 300), (4, 4)),  # no power of two gives four
        ({"quant_method": "fp8"}, (192, 192), (2, 0)),
    ],
)
def test_blocks_that_would_be_guessed_are_refused(tmp_path, quantization, shape, grid):
    source, _ = _with_blocks(tmp_path, quantization, shape, grid)
    with pytest.raises(SourceError, match=r"l\.weight_scale.*scales do not fit the weight"):
        convert(source, tmp_path / "out", scheme="int8", include=("*",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.altup.correct_output_scale", "model.layers.0.self_attn.in_output_scale"),
        *("model.k_scale_of_all", "model.layers.1.self_attn.k_scale", "input_scale"),
    ],
)
def test_parameters_that_end_in_the_words_of_a_quantizer_stay(tmp_path, name):
    """Gemma3n has one: it stands beside no weight that is quantized."""
    tensors, config = KEPT["fp8_per_channel"]()
    tensors[name] = ("BF16", bf16(np.arange(256)))
    tensors["model.layers.0.altup.router.weight"] = ("BF16", bf16(np.ones((4, 256))))
    source = write_source(tmp_path / "s", tensors, config)
    convert(source, tmp_path / "out")
    with Container(tmp_path / "out") as container:
        assert read_tensor_bytes(container, name) == tensors[name][1].tobytes()
        left = {key for key in tensors if key not in container.records}
    assert left == {key for key in tensors if key.endswith("_scale") and key != name}


def _refused_as_int8(tmp_path, tensors, config):
    source = write_source(tmp_path / "s", tensors, config)
    with pytest.raises(SourceError, match="--scheme lossless keeps every bit") as caught:
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "lossless", scheme="lossless")
    with Container(tmp_path / "lossless") as container:
        assert set(container.records) == set(tensors)
    return caught.value.tensor


def test_weights_of_rotated_inputs_are_refused(tmp_path):
    tensors, config = KEPT["int8_per_channel"]()
    config["quantization_config"]["transform_config"] = {"config_groups": {"R4": {"a": 1}}}
    assert _refused_as_int8(tmp_path, tensors, config) is None


ROW, SMALL = ("F32", np.ones(256, np.float32)), ("BF16", bf16(np.ones((4, 256))))
PARTS = {
    "weight_g_idx": ("I32", np.repeat(np.arange(2, dtype=np.int32), 128)),
    "pre_quant_scale": ROW,
    "smooth_factor": ROW,
    "weight_offset": ROW,
    "zero": ROW,
    "perm": ("I64", np.arange(256)),
    "weight_zp": ("I8", np.ones((256, 1), np.int8)),
    "lora_down": SMALL,
    "lora_down.weight": SMALL,
}


@pytest.mark.parametrize("has_block", [True, False])
@pytest.mark.parametrize("last", PARTS)
def test_tensors_of_unknown_use_beside_a_weight_are_refused(tmp_path, last, has_block):
    """Factors of inputs, zeros, orders of columns, halves of low rank: each changes the weight."""
    tensors, config = KEPT["int8_per_channel"]()
    name = f"model.layers.0.self_attn.q_proj.{last}"
    tensors[name] = PARTS[last]
    if not has_block:
        del config["quantization_config"]
    assert _refused_as_int8(tmp_path, tensors, config) == name


def test_the_rest_after_rounding_is_refused(tmp_path):
    """A second weight of 8 bits with scales of its own, in the module of the first."""
    tensors, config = KEPT["int8_per_channel"]()
    stem = "model.layers.0.self_attn.q_proj.weight"
    tensors[f"{stem}_residual"] = tensors[stem]
    tensors[f"{stem}_residual_scale"] = tensors[f"{stem}_scale"]
    assert _refused_as_int8(tmp_path, tensors, config) == f"{stem}_residual"


@pytest.mark.parametrize("name", ["gate_up_proj_smooth", "down_proj.perm"])
def test_tensors_of_unknown_use_beside_experts_are_refused(tmp_path, name):
    tensors, config = KEPT["gpt_oss_mxfp4"]()
    stem = next(key for key in tensors if key.endswith("gate_up_proj_blocks"))
    name = stem.replace("gate_up_proj_blocks", name)
    tensors[name] = ROW
    assert _refused_as_int8(tmp_path, tensors, config) == name


def test_modules_whose_names_go_on_from_that_of_a_weight(tmp_path):
    """A module `q_proj_norm` and a bias are no parts of the weight of `q_proj`."""
    tensors, config = KEPT["int8_per_channel"]()
    stem = "model.layers.0.self_attn.q_proj"
    others = {f"{stem}_norm.weight", f"{stem}.bias"}
    tensors |= {name: ("BF16", bf16(np.arange(256))) for name in others}
    convert(write_source(tmp_path / "s", tensors, config), tmp_path / "out")
    with Container(tmp_path / "out") as container:
        assert others <= set(container.records)


def test_weights_in_mxfp4_replace_no_tensor_of_their_name(tmp_path):
    tensors = {
        "a": ("BF16", bf16(np.ones((4, 4)))),
        "a_blocks": ("U8", np.zeros((1, 2, 2, 16), np.uint8)),
        "a_scales": ("U8", np.full((1, 2, 2), 127, np.uint8)),
    }
    source = write_source(tmp_path / "s", tensors, {"model_type": "x"})
    with pytest.raises(SourceError, match=r"tensor 'a'.*also that of another tensor"):
        convert(source, tmp_path / "out", scheme="int8")
    convert(source, tmp_path / "lossless", scheme="lossless")


def test_a_config_of_very_many_blocks_ends_soon(tmp_path):
    block = {"quantization_config": {"quant_method": "gptq"}}
    config = {"model_type": "x", **{f"part{n}": block for n in range(3000)}}
    source = write_source(tmp_path / "s", {"a.weight": MATRIX}, config)
    with pytest.raises(SourceError, match=r"too many quantization blocks.*more than 64"):
        convert(source, tmp_path / "out")


def test_two_blocks_that_no_tensor_bears_out(tmp_path):
    block = {"quantization_config": {"quant_method": "gptq"}}
    config = {"model_type": "x", **block, "text_config": block, "vision_config": block}
    source = write_source(tmp_path / "s", {"a.weight": MATRIX}, config)
    convert(source, tmp_path / "out")
    written = _config(tmp_path / "out")
    assert written["text_config"] == written["vision_config"] == {}


def test_a_method_that_keeps_16_bits(tmp_path):
    config = {"model_type": "bitnet", "quantization_config": {"quant_method": "bitnet"}}
    source = write_source(tmp_path / "s", {"a.weight": MATRIX}, config)
    report = convert(source, tmp_path / "out", scheme="lossless")
    assert report.manifest.source.quantization == "bitnet"
    with pytest.raises(SourceError, match="bitnet"):
        convert(source, tmp_path / "other")


@pytest.mark.parametrize("shape", [(), (0,), (1,), (16,), (0, 16), (1, 0), (2, 3, 0)])
@pytest.mark.parametrize("dtype", ["U8", "I8", "I32", "F8_E4M3"])
@pytest.mark.parametrize(
    "names",
    [
        ("a_blocks", "a_scales"),
        ("a.weight", "a.weight_scale"),
        ("a.weight", "a.weight_scale_inv"),
        ("a.weight_packed", "a.weight_scale"),
        ("a.qweight", "a.scales"),
    ],
)
def test_shapes_that_no_quantizer_writes(tmp_path, names, dtype, shape):
    item = {"U8": np.uint8, "I8": np.int8, "I32": np.int32, "F8_E4M3": np.uint8}[dtype]
    tensors = {name: (dtype, np.zeros(shape, item)) for name in names}
    source = write_source(tmp_path / "s", {**tensors, "b.weight": MATRIX}, {"model_type": "x"})
    for scheme in ("lossless", "int8"):
        try:
            convert(source, tmp_path / scheme, scheme=scheme)
        except CodecLLMError:
            assert not (tmp_path / scheme).exists()
            continue
        with Container(tmp_path / scheme) as container:
            for name, (_, values) in tensors.items():
                if container.records[name].dtype == dtype:
                    assert read_tensor_bytes(container, name) == values.tobytes()


@pytest.mark.parametrize(
    "name", ["a.weight_scale", "a.weight_scale_inv", "a.weight_shape", "a.weight_packed"]
)
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_names_that_only_look_quantized(tmp_path, name, scheme):
    """Names like those of side tensors, beside weights of 16 bits and without a block."""
    tensors = {"a.weight": MATRIX, name: ("BF16", bf16(np.ones((300, 1))))}
    source = write_source(tmp_path / "s", tensors, {"model_type": "x"})
    report = convert(source, tmp_path / "out", scheme=scheme)
    assert report.warnings == [] and report.manifest.source.quantization is None
    with Container(tmp_path / "out") as container:
        for key, (_, values) in tensors.items():
            if container.records[key].scheme != "int8":
                assert read_tensor_bytes(container, key) == values.tobytes()


def test_plain_8_bit_floats_are_no_quantization(tmp_path):
    tensors = {"a.weight": ("F8_E4M3", np.full((256, 256), 0x38, np.uint8))}
    source = write_source(tmp_path / "s", tensors, {"model_type": "x"})
    for scheme in ("int8", "lossless"):
        report = convert(source, tmp_path / scheme, scheme=scheme)
        assert report.manifest.tensors[0].scheme == "lossless"
        assert report.warnings == []


def test_fp8_planes_shrink(tmp_path):
    """Normal weights in E4M3: a byte has an entropy of about 6.6 bits, sign and mantissa too."""
    weights = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    scaled = (weights / weights.abs().max() * 448).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": ("F8_E4M3", scaled.view(torch.uint8).numpy()),
        "a.weight_scale_inv": ("F32", np.ones((4, 8), np.float32)),
    }
    config = {"model_type": "x", "quantization_config": {"quant_method": "fp8"}}
    source = write_source(tmp_path / "s", tensors, config)
    report = convert(source, tmp_path / "out", scheme="lossless", codec="rans")
    plane = report.manifest.tensors[0].planes[0]
    assert plane.stored_bytes < 0.9 * plane.raw_bytes
    assert 8 * plane.stored_bytes < 1.01 * plane.entropy_bits


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_verify_compares_with_the_source(tmp_path, scheme):
    source, _, _ = _write(tmp_path, "deepseek_fp8")
    convert(source, tmp_path / "out", scheme=scheme, include=("*proj*",))
    with Container(tmp_path / "out") as container, SourceModel(source, view=scheme) as model:
        stage = Stage("source")
        check_source(container, model, stage, 1, None)
    assert stage.findings == []


@pytest.mark.parametrize("name", ["deepseek_fp8", "nvfp4"])
def test_an_export_is_the_source_again(tmp_path, name):
    source, tensors, config = _write(tmp_path, name)
    convert(source, tmp_path / "out", scheme="lossless")
    export(tmp_path / "out", tmp_path / "plain")
    assert _config(tmp_path / "plain") == config
    with SourceModel(tmp_path / "plain") as model:
        for key, (_, values) in tensors.items():
            tensor = model.tensors[key]
            stored = tensor.read_bytes(0, tensor.entry.bytes)
            assert stored == np.ascontiguousarray(values).tobytes()


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_scales_without_a_block_are_said(tmp_path, name):
    """transformers saves FP8 codes and scales after it dequantized a model, and drops the block."""
    tensors, config = KEPT[name]()
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    config.pop("text_config", None)
    source = write_source(tmp_path / "source", tensors, config)
    report = convert(source, tmp_path / "lossless", scheme="lossless")
    (warning,) = report.warnings
    assert "no quantization_config" in warning
    assert "but not their scales" in warning
