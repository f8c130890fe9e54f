"""Tiny sources with the names, types and shapes that published quantized checkpoints have."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.sources import Tensors, bf16

_rng = np.random.default_rng


def _fp8(seed: int, rows: int, cols: int) -> np.ndarray:
    """Bits of normal-looking E4M3 numbers: no NaN."""
    rng = _rng(seed)
    magnitude = np.clip(rng.normal(70, 12, (rows, cols)), 0, 126).astype(np.uint8)
    return magnitude | (rng.integers(0, 2, (rows, cols), dtype=np.uint8) << 7)


def _bytes(seed: int, *shape: int) -> np.ndarray:
    return _rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _scales(seed: int, *shape: int) -> np.ndarray:
    return (_rng(seed).random(shape, np.float32) + 0.5) * np.float32(1e-3)


def _plain() -> Tensors:
    values = _rng(99).standard_normal((320, 256)).astype(np.float32)
    return {
        "model.embed_tokens.weight": ("BF16", bf16(values)),
        "model.norm.weight": ("BF16", bf16(np.ones(256))),
    }


def deepseek_fp8() -> tuple[Tensors, dict[str, Any]]:
    """DeepSeek-V3: E4M3 in 128 x 128 blocks, scales in `weight_scale_inv`; ragged last blocks."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    tensors = {
        name: ("F8_E4M3", _fp8(1, 320, 300)),
        f"{name}_scale_inv": ("F32", _scales(2, 3, 3)),
        "model.layers.0.mlp.experts.0.up_proj.weight": ("F8_E4M3", _fp8(3, 256, 384)),
        "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv": ("F32", _scales(4, 2, 3)),
    }
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return _plain() | tensors, {"model_type": "deepseek_v3", "quantization_config": block}


def gpt_oss_mxfp4() -> tuple[Tensors, dict[str, Any]]:
    """gpt-oss: experts as blocks of 32 E2M1 codes, two a byte, with a shared exponent each."""
    stem = "model.layers.0.mlp.experts"
    tensors = {
        f"{stem}.gate_up_proj_blocks": ("U8", _bytes(5, 4, 128, 4, 16)),
        f"{stem}.gate_up_proj_scales": ("U8", _rng(6).integers(118, 124, (4, 128, 4), np.uint8)),
        f"{stem}.gate_up_proj_bias": ("BF16", bf16(np.zeros((4, 128)))),
        f"{stem}.down_proj_blocks": ("U8", _bytes(7, 4, 128, 2, 16)),
        f"{stem}.down_proj_scales": ("U8", _rng(8).integers(118, 124, (4, 128, 2), np.uint8)),
    }
    block = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    return _plain() | tensors, {"model_type": "gpt_oss", "quantization_config": block}


def gptq() -> tuple[Tensors, dict[str, Any]]:
    """GPTQ: eight 4-bit codes in an int32, zeros packed too."""
    stem = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{stem}.qweight": ("I32", _bytes(9, 32, 256, 4).view(np.int32)[..., 0]),
        f"{stem}.qzeros": ("I32", _bytes(10, 2, 32, 4).view(np.int32)[..., 0]),
        f"{stem}.scales": ("F16", _scales(11, 2, 256).astype(np.float16)),
        f"{stem}.g_idx": ("I32", np.repeat(np.arange(2, dtype=np.int32), 128)),
    }
    block = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    return _plain() | tensors, {"model_type": "llama", "quantization_config": block}


def awq() -> tuple[Tensors, dict[str, Any]]:
    """AWQ: as GPTQ without group indices, packed along the outputs."""
    stem = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{stem}.qweight": ("I32", _bytes(12, 256, 32, 4).view(np.int32)[..., 0]),
        f"{stem}.qzeros": ("I32", _bytes(13, 2, 32, 4).view(np.int32)[..., 0]),
        f"{stem}.scales": ("F16", _scales(14, 2, 256).astype(np.float16)),
    }
    block = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
    return _plain() | tensors, {"model_type": "llama", "quantization_config": block}


def compressed_int4() -> tuple[Tensors, dict[str, Any]]:
    """compressed-tensors, pack-quantized: packed codes, group scales, and a `weight_shape`."""
    stem = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{stem}.weight_packed": ("I32", _bytes(15, 256, 32, 4).view(np.int32)[..., 0]),
        f"{stem}.weight_scale": ("BF16", bf16(_scales(16, 256, 2))),
        f"{stem}.weight_shape": ("I64", np.array([256, 256], np.int64)),
    }
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return _plain() | tensors, {"model_type": "llama", "quantization_config": block}


def nvfp4() -> tuple[Tensors, dict[str, Any]]:
    """NVFP4: two E2M1 codes a byte, an E4M3 scale for 16, one for all; in a part of the config."""
    stem = "language_model.model.layers.0.mlp.up_proj"
    tensors = {
        f"{stem}.weight_packed": ("U8", _bytes(17, 256, 128)),
        f"{stem}.weight_scale": ("F8_E4M3", _fp8(18, 256, 16)),
        f"{stem}.weight_global_scale": ("F32", _scales(19, 1)),
        f"{stem}.input_global_scale": ("F32", _scales(20, 1)),
    }
    block = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    config = {"model_type": "llava", "text_config": {"quantization_config": block}}
    return _plain() | tensors, config


def bitsandbytes_nf4() -> tuple[Tensors, dict[str, Any]]:
    """bitsandbytes: packed NF4 codes with their state beside them."""
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {
        name: ("U8", _bytes(21, 32768, 1)),
        f"{name}.absmax": ("U8", _bytes(22, 1024)),
        f"{name}.quant_map": ("F32", _scales(23, 16)),
        f"{name}.nested_absmax": ("F32", _scales(24, 4)),
        f"{name}.quant_state.bitsandbytes__nf4": ("U8", _bytes(25, 80)),
    }
    block = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return _plain() | tensors, {"model_type": "llama", "quantization_config": block}


def fp8_per_channel() -> tuple[Tensors, dict[str, Any]]:
    """fbgemm and compressed-tensors (float-quantized): a scale for each row, activation scales."""
    stem = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.weight": ("F8_E4M3", _fp8(26, 256, 256)),
        f"{stem}.weight_scale": ("F32", _scales(27, 256, 1)),
        f"{stem}.input_scale": ("F32", _scales(28, 1)),
        "model.layers.0.self_attn.k_scale": ("F32", np.ones(1, np.float32)),
    }
    block = {"quant_method": "fbgemm_fp8"}
    return _plain() | tensors, {"model_type": "llama", "quantization_config": block}


def int8_per_channel() -> tuple[Tensors, dict[str, Any]]:
    """compressed-tensors, int-quantized: int8 codes with a scale for each row."""
    stem = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.weight": ("I8", _bytes(29, 256, 256).view(np.int8)),
        f"{stem}.weight_scale": ("BF16", bf16(_scales(30, 256, 1))),
    }
    block = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    return _plain() | tensors, {"model_type": "llama", "quantization_config": block}


def _of_one_layer(method: str, **parts: Any) -> tuple[Tensors, dict[str, Any]]:
    """A linear layer's tensors by the last parts of their names, and the method's block."""
    stem = "model.layers.0.mlp.up_proj."
    tensors = {stem + name: part for name, part in parts.items()}
    return _plain() | tensors, {
        "model_type": "llama",
        "quantization_config": {"quant_method": method},
    }


def hqq() -> tuple[Tensors, dict[str, Any]]:
    """HQQ: two codes a byte, a scale and a zero for each group."""
    return _of_one_layer(
        "hqq",
        W_q=("U8", _bytes(31, 256, 128)),
        scale=("BF16", bf16(_scales(32, 1024, 1))),
        zero=("BF16", bf16(_scales(33, 1024, 1))),
        nbits=("I64", np.array(4, np.int64)),
        shape=("I64", np.array([256, 256], np.int64)),
    )


def spqr() -> tuple[Tensors, dict[str, Any]]:
    """SpQR: codes in 64 bits, and outliers as a sparse matrix."""
    return _of_one_layer(
        "spqr",
        dense_weights=("I64", _bytes(34, 4096, 8).view(np.int64)[..., 0]),
        row_offsets=("I32", np.zeros(257, np.int32)),
        col_vals=("I32", np.zeros(10, np.int32)),
        in_perm=("I16", np.arange(256, dtype=np.int16)),
    )


def vptq() -> tuple[Tensors, dict[str, Any]]:
    """VPTQ: indices of vectors of a codebook."""
    return _of_one_layer(
        "vptq",
        indices=("I32", _bytes(35, 1, 256, 16, 4).view(np.int32)[..., 0]),
        **{"centroids.weight": ("BF16", bf16(_scales(36, 1, 2048)))},
        weight_scale=("BF16", bf16(_scales(37, 256))),
        weight_bias=("BF16", bf16(_scales(38, 256))),
    )


def torchao() -> tuple[Tensors, dict[str, Any]]:
    """torchao in safetensors: the parts of its tensor classes."""
    return _of_one_layer(
        "torchao",
        _weight_qdata=("I8", _bytes(39, 256, 256).view(np.int8)),
        _weight_scale=("F32", _scales(40, 256, 1)),
    )


def gemma_embeddings() -> tuple[Tensors, dict[str, Any]]:
    """Gemma's own method: int8 codes, those of embeddings under another name."""
    tensors, config = _of_one_layer(
        "gemma",
        weight=("I8", _bytes(41, 256, 256).view(np.int8)),
        weight_scale=("F32", _scales(42, 256, 1)),
        input_activation_scale=("F32", np.array(0.5, np.float32)),
    )
    del tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.embedding_quantized"] = ("I8", _bytes(43, 320, 256).view(np.int8))
    tensors["model.embed_tokens.embedding_scale"] = ("F32", _scales(44, 320, 1))
    return tensors, config


def gemma() -> tuple[Tensors, dict[str, Any]]:
    """The same with plain embeddings, and scales of activations."""
    tensors, config = gemma_embeddings()
    plain = {name: part for name, part in tensors.items() if "embed" not in name}
    scale = ("F32", np.array(0.5, np.float32))
    names = ("mlp.up_proj.output_activation_scale", "mlp.k_cache_scale")
    return _plain() | plain | {f"model.layers.0.{name}": scale for name in names}, config


KEPT = {
    "deepseek_fp8": deepseek_fp8,
    "gpt_oss_mxfp4": gpt_oss_mxfp4,
    "gptq": gptq,
    "awq": awq,
    "compressed_int4": compressed_int4,
    "nvfp4": nvfp4,
    "bitsandbytes_nf4": bitsandbytes_nf4,
    "fp8_per_channel": fp8_per_channel,
    "int8_per_channel": int8_per_channel,
    "hqq": hqq,
    "spqr": spqr,
    "vptq": vptq,
    "torchao": torchao,
    "gemma": gemma,
    "gemma_embeddings": gemma_embeddings,
}
"""All of them: `lossless` keeps every bit."""

DEQUANTIZED = ("deepseek_fp8", "gpt_oss_mxfp4", "fp8_per_channel", "int8_per_channel", "gemma")
"""Those from which `int8` is made."""
