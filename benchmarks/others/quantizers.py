"""Other tools' quantizers of linear layers: the dequantized values and the stored bits.

Optional: `pip install --no-deps bitsandbytes` and `DISABLE_CUDA=1 pip install --no-deps hqq
termcolor`. Their results become plain folders that `codecllm eval` reads as `dequantized`
candidates. Descriptions of tensors in a file are not counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from codecllm.verifier.evaluation.candidates import STORED_BITS_NAME

Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
"""Float32 matrix -> the dequantized matrix, and its stored bits."""


def nf4(double: bool) -> Quantizer:
    """Returns bitsandbytes' NF4 with blocks of 64; `double` quantizes the blocks' scales too."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
        codes, state = quantize_4bit(
            matrix, blocksize=64, quant_type="nf4", compress_statistics=double
        )
        bits = _bits(codes) + _bits(state.absmax)
        if double:
            bits += _bits(state.state2.absmax) + _bits(state.offset)
        return dequantize_4bit(codes, state), bits

    return quantize


def hqq(axis: int) -> Quantizer:
    """Returns HQQ's 4 bits with groups of 64 along an axis; its scales and zeros are float16."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
        linear = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        linear.weight.data = matrix.clone()
        settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
        layer = HQQLinear(linear, settings, compute_dtype=torch.float16, device="cpu")
        stored_tensors = (layer.W_q, layer.meta["scale"], layer.meta["zero"])
        return layer.dequantize().float(), sum(map(_bits, stored_tensors))

    return quantize


def linear_layers(model: Path) -> dict[str, torch.Tensor]:
    """Returns the matrices inside the layers of a plain model, in float32."""
    tensors = load_file(model / "model.safetensors")
    return {
        name: tensor.float()
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and ".layers." in name
    }


def write_dequantized(
    model: Path, out: Path, matrices: dict[str, tuple[torch.Tensor, int]]
) -> Path:
    """Writes a plain folder with replaced matrices and a file of stored bits; returns it.

    Args:
        model: Hugging Face folder, one safetensors file.
        out: the folder to make.
        matrices: by name, float32 values and their stored bits. All other tensors stay as they are.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = load_file(model / "model.safetensors")
    bits = {name: _bits(tensor) for name, tensor in tensors.items()}
    for name, (values, stored_bits) in matrices.items():
        tensors[name], bits[name] = values.contiguous(), stored_bits
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / STORED_BITS_NAME).write_text(json.dumps(bits, indent=1) + "\n")
    shutil.copy2(model / "config.json", out)
    return out


def _bits(tensor: torch.Tensor) -> int:
    return 8 * tensor.numel() * tensor.element_size()
