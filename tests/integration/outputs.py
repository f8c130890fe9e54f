"""The outputs and weights of models that tests compare."""

from __future__ import annotations

from typing import Any

import torch

from codecllm.loader.hf.experts import loops_over_experts
from codecllm.loader.resident.coded_weight import CodedWeight

_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.int64: torch.int64,
}


def logits(model: Any) -> torch.Tensor:
    """Returns the first output of a tiny model, of any architecture, on fixed inputs."""
    ids = torch.arange(3, 23).reshape(2, 10)
    inputs = {"input_ids": ids}
    if model.config.model_type == "whisper":
        inputs = {
            "input_features": torch.linspace(-1, 1, 16 * 64).reshape(1, 16, 64),
            "decoder_input_ids": ids[:1, :4],
        }
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    elif model.config.model_type == "llava":
        inputs["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=model.dtype).reshape(
            2, 3, 16, 16
        )
        inputs["input_ids"][:, 2:6] = 511
    with torch.inference_mode():
        return model(**inputs)[0]


def coded_weights(model: Any) -> dict[str, CodedWeight]:
    """Returns the coded weights of a model by parameter name, tied ones under each name."""
    return {
        name: weight
        for name, weight in model.named_parameters(remove_duplicate=False)
        if isinstance(weight, CodedWeight)
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs and zeros included."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(_BITS[a.dtype]), b.contiguous().view(_BITS[b.dtype])
    )


def in_experts_loop(model: Any) -> Any:
    """Lets a plain model run its experts as a model with coded ones does; returns it."""
    if any(loops_over_experts(module) for module in model.modules()):
        model.set_experts_implementation("eager")
    return model
