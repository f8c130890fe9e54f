"""Quantized sources: transformers' quantizer gets the source's tensors, and the same model."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import codecllm
from codecllm.converter import convert
from codecllm.converter.exports.export import export
from codecllm.formats.errors import LayoutError, SourceError, UsageError
from codecllm.formats.manifest.manifest import ORIGINAL_KEY
from codecllm.loader import from_pretrained
from codecllm.verifier import verify
from tests.tampering import replace_listed

IDS = torch.tensor([[1, 5, 9, 7]])
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _save(model, folder, seed=0):
    model.bfloat16().save_pretrained(folder)
    return folder


def _llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=512,
            **options,
        )
    )


def _deepseek():
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=128,
        vocab_size=512,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _to_fp8(folder):
    """Rewrites projections as E4M3 in 128 x 128 blocks, the form of DeepSeek-V3 and Qwen3."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name].float()
        if weight.shape[0] % 128 or weight.shape[1] % 128:
            continue
        blocks = weight.view(weight.shape[0] // 128, 128, weight.shape[1] // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, path, {"format": "pt"})
    _edit_config(folder, quantization_config=FP8)
    return folder


def _dequantized(source, folder):
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scales = tensors.pop(name)
        weight = tensors[name.removesuffix("_scale_inv")].float()
        spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        tensors[name.removesuffix("_scale_inv")] = (weight * spread).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def _assert_same(expected, model):
    """The same parameters and buffers, bit for bit, and the same logits."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        same = ours[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)
        assert value.ndim == 0 or torch.equal(*same), name
    assert torch.equal(_logits(model), _logits(expected))


def _assert_loads_as(source, container):
    auto = transformers.AutoModelForCausalLM
    for model in (from_pretrained(container), auto.from_pretrained(container)):
        # A forward pass may change a quantized model: each is compared with a new one.
        _assert_same(auto.from_pretrained(source), model)


@pytest.mark.parametrize("make", [_llama, _deepseek])
def test_fp8_in_blocks(tmp_path, make):
    source = _to_fp8(_save(make(), tmp_path / "s"))
    convert(source, tmp_path / "c", scheme="lossless")
    _assert_loads_as(source, tmp_path / "c")


@pytest.mark.parametrize("make", [_llama, _deepseek])
def test_int8_of_fp8_is_that_of_the_dequantized_model(tmp_path, make):
    source = _to_fp8(_save(make(), tmp_path / "s"))
    convert(source, tmp_path / "c", include=("*proj.weight",))
    convert(_dequantized(source, tmp_path / "plain"), tmp_path / "d", include=("*proj.weight",))
    _assert_same(from_pretrained(tmp_path / "d"), from_pretrained(tmp_path / "c"))


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
@pytest.mark.parametrize("extra", ["spare layer", "scales of activations"])
def test_verify_of_fp8_with_tensors_that_the_class_leaves_over(tmp_path, scheme, extra):
    """Published DeepSeek-V3 has a layer more than its class; static FP8 has scales of inputs."""
    source = _to_fp8(_save(_llama(), tmp_path / "s"))
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if ".layers.1." in name]:
        if extra == "spare layer":
            tensors[name.replace(".layers.1.", ".layers.61.")] = tensors[name].clone()
        elif name.endswith("k_proj.weight"):
            for last in ("input_scale", "k_scale"):
                tensors[name.replace("weight", last)] = torch.tensor(0.5)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    codecllm.convert(source, tmp_path / "c", scheme=scheme, baseline=False)
    report = verify(tmp_path / "c", source=source)
    assert report.ok, report.to_json()
    assert not report.stage("model").skipped
    # A tensor less is still seen.
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert not verify(tmp_path / "c", source=source).ok


@pytest.mark.parametrize(
    "change", [None, {"activation_scheme": "static"}, {"modules_to_not_convert": ["lm_head"]}]
)
def test_a_block_that_is_not_the_sources(tmp_path, change):
    """The same codes are other weights by another block, and without one."""
    source = _to_fp8(_save(_llama(), tmp_path / "s"))
    codecllm.convert(source, tmp_path / "c", scheme="lossless", baseline=False)
    assert verify(tmp_path / "c", source=source).ok
    assert codecllm.compare_models(tmp_path / "c", source, run=False)["same"]
    other = shutil.copytree(source, tmp_path / "other")
    if change is None:
        config = json.loads((other / "config.json").read_text())
        del config["quantization_config"]
        (other / "config.json").write_text(json.dumps(config))
    else:
        _edit_config(other, quantization_config=FP8 | change)
    assert not verify(tmp_path / "c", source=other).ok
    for one in (tmp_path / "c", source):
        result = codecllm.compare_models(one, other, run=False)
        assert not result["same"]
        assert result["files"] == ["config.json"]


def test_a_block_that_no_tensor_bears_out_is_not_exported(tmp_path):
    """transformers would make the quantized weights at random."""
    source = _save(_llama(), tmp_path / "s")
    convert(source, tmp_path / "c", scheme="lossless")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["quantization_config"][ORIGINAL_KEY] = FP8
    replace_listed(tmp_path / "c", "config.json", json.dumps(config).encode())
    with pytest.raises(LayoutError, match="no tensor is quantized so"):
        export(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _gpt_oss(folder):
    """gpt-oss with experts as published: MXFP4 blocks and scales in place of the weights."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=512,
    )
    _save(transformers.GptOssForCausalLM(config), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    names = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    block = {"quant_method": "mxfp4", "modules_to_not_convert": [*names, "model.embed_tokens"]}
    _edit_config(folder, quantization_config=block)
    return folder


def test_mxfp4(tmp_path):
    source = _gpt_oss(tmp_path / "s")
    convert(source, tmp_path / "c", scheme="lossless")
    _assert_loads_as(source, tmp_path / "c")


def test_int8_of_mxfp4_is_near_the_dequantized_model(tmp_path):
    source = _gpt_oss(tmp_path / "s")
    convert(source, tmp_path / "c", include=("*experts*_proj",))
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)
    for name, value in from_pretrained(tmp_path / "c").state_dict().items():
        weights = expected.state_dict()[name]
        step = weights.float().abs().max() / 127
        assert (value.float() - weights.float()).abs().max() <= step, name


def _compress(folder, scheme):
    """Quantizes by compressed-tensors itself, as llm-compressor writes it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = _llama().bfloat16()
    targets = preset_name_to_scheme(scheme, ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": targets}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight = module.weight.float()
            shape = module.weight_scale.shape
            grouped = weight.view(shape[0], shape[-1] if len(shape) > 1 else 1, -1)
            scales = grouped.abs().amax(-1) / (7 if "W4" in scheme else 127)
            module.weight_scale.data.copy_(scales.view(shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_compressed_tensors(tmp_path, scheme):
    source = _compress(tmp_path / "s", scheme)
    convert(source, tmp_path / "c", scheme="lossless")
    _assert_loads_as(source, tmp_path / "c")


def test_a_block_in_a_part_of_the_config(tmp_path):
    """Vision-language models carry the block of the language model in `text_config`."""
    torch.manual_seed(0)
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    config = transformers.LlavaConfig(
        text_config=_llama().config, vision_config=transformers.CLIPVisionConfig(**vision)
    )
    model = transformers.LlavaForConditionalGeneration(config)
    source = _to_fp8(_save(model, tmp_path / "s"))
    document = json.loads((source / "config.json").read_text())
    document["text_config"]["quantization_config"] = document.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(document))
    convert(source, tmp_path / "c", scheme="lossless")
    auto = transformers.AutoModelForImageTextToText
    expected = auto.from_pretrained(source)
    _assert_same(expected, from_pretrained(tmp_path / "c"))
    _assert_same(expected, auto.from_pretrained(tmp_path / "c"))


@pytest.mark.parametrize("resident", ["int8", "compressed"])
def test_residencies_are_the_quantizers_matter(tmp_path, resident):
    convert(_to_fp8(_save(_llama(), tmp_path / "s")), tmp_path / "c", scheme="lossless")
    with pytest.raises(UsageError, match=r"source is quantized \(fp8\)"):
        from_pretrained(tmp_path / "c", resident=resident)


def test_a_method_whose_library_is_missing_is_one_error(tmp_path):
    source = _save(_llama(), tmp_path / "s")
    path = source / "model.safetensors"
    tensors = load_file(path)
    stem = "model.layers.0.mlp.up_proj"
    del tensors[f"{stem}.weight"]
    tensors[f"{stem}.qweight"] = torch.zeros(32, 512, dtype=torch.int32)
    save_file(tensors, path, {"format": "pt"})
    _edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    convert(source, tmp_path / "c", scheme="lossless")
    with pytest.raises(Exception, match=r"optimum|gptqmodel|GPTQ") as caught:
        from_pretrained(tmp_path / "c")
    assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="gptq"):
        convert(source, tmp_path / "d")


def test_a_quantizer_is_still_chosen_and_finished_under_these_names():
    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained)
    assert "hf_quantizer, config, device_map = get_hf_quantizer(" in source
    assert "hf_quantizer.postprocess_model(" in source
    chosen = modeling_utils.get_hf_quantizer
    chosen = getattr(chosen, "_codecllm_original", chosen)
    assert next(iter(inspect.signature(chosen).parameters)) == "config"


@pytest.mark.parametrize("include", [("*proj*",), ("nothing",)])
def test_int8_codes_with_scales_of_activations(tmp_path, include):
    """transformers' `gemma` method: int8 weights in a row's scale each, which it keeps in codes."""
    source = _save(_llama(), tmp_path / "s")
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name], tensors[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
        for side in ("input", "output"):
            tensors[f"{name.removesuffix('weight')}{side}_activation_scale"] = torch.tensor(0.0)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    _edit_config(source, quantization_config={"quant_method": "gemma", "num_bits": 8})
    convert(source, tmp_path / "c", include=include)
    model = from_pretrained(tmp_path / "c")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = (tensors[name].float() * tensors[f"{name}_scale"]).bfloat16().float()
    step = expected.abs().amax(1, keepdim=True) / 127
    assert ((model.get_parameter(name).float() - expected).abs() <= step).all()
    report = verify(tmp_path / "c", source=source)
    assert report.ok
    stage = report.stage("model")
    assert stage.skipped
    if "gemma" in AUTO_QUANTIZER_MAPPING:  # older versions of transformers cannot load the source
        assert "codes of its quantizer" in stage.summary
