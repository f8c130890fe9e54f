"""Modules that keep int8 codes and float32 scales in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from codecllm.loader.resident.int8_matmul import dequantize_rows, int8_linear


class Int8Weight(nn.Module):
    """What int8 modules have in common: codes and scales instead of a weight.

    While a model is loaded, `weight` is an int8 parameter, which receives the codes under the weight's name and is tied as
    the weight would be. `seal` then turns it into the buffer `codes`, and `weight` becomes the dequantized weight, made anew
    each time: code that reaches for a module's weight instead of calling the module computes the right thing, if slowly.

    Attributes:
        codes: int8 [rows, cols], once sealed.
        weight_scale: float32 [rows], whatever dtype the model is cast to.
        weight_col_scale: float32 [cols] likewise, or None where columns have no scales.
        weight_dtype: dtype of `weight`; follows `model.to(dtype)`.
    """

    codes: torch.Tensor
    weight_scale: torch.Tensor
    weight_col_scale: torch.Tensor | None
    weight_dtype: torch.dtype

    def seal(self) -> None:
        """Ends loading: the codes become a buffer."""
        codes = self._parameters.pop("weight")
        assert codes is not None
        self.register_buffer("codes", codes.data)

    def __getattr__(self, name: str) -> Any:
        """Dequantizes `weight` once the codes have replaced it."""
        if name == "weight" and "codes" in self._buffers:
            return dequantize_rows(
                self.codes, self.weight_scale, self.weight_dtype, self.weight_col_scale
            )
        return super().__getattr__(name)

    def _start(self, weight: torch.Tensor, by_column: bool) -> None:
        """Registers uninitialised codes and scales (those of columns too: `by_column`) in place of a weight, on its device."""
        self.weight_dtype = weight.dtype
        self.register_parameter(
            "weight", nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
        )
        self.register_buffer(
            "weight_scale", torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        )
        columns = (
            torch.empty(weight.shape[1], dtype=torch.float32, device=weight.device)
            if by_column
            else None
        )
        self.register_buffer("weight_col_scale", columns)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """As usual, but a cast leaves the scales in float32 and sets the dtype of `weight`."""
        before = {name: self._buffers[name] for name in ("weight_scale", "weight_col_scale")}
        origin = self.weight_scale.device
        super()._apply(fn, recurse)
        for name, scale in before.items():
            after = self._buffers[name]
            if scale is not None and after is not None and after.dtype != torch.float32:
                device = after.device
                setattr(
                    self,
                    name,
                    torch.empty_like(scale, device=device)
                    if device.type == "meta"
                    else scale.to(device),
                )
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=origin)).dtype
        return self


class Int8Linear(Int8Weight, nn.Linear):
    """A linear layer that keeps int8 codes [out, in] and dequantizes where it multiplies."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, by_column: bool = False) -> Int8Linear:
        """Returns an uninitialised twin of `linear` on its device; the bias is taken over."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        twin.in_features, twin.out_features = linear.in_features, linear.out_features
        twin._start(linear.weight, by_column)
        twin.register_parameter("bias", linear.bias)
        twin.train(linear.training)
        return twin

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps float [..., in] to [..., out] of the same dtype."""
        return int8_linear(inputs, self.codes, self.weight_scale, self.bias, self.weight_col_scale)


class Int8Embedding(Int8Weight, nn.Embedding):
    """An embedding that keeps int8 codes [vocabulary, width] and dequantizes the rows that it looks up."""

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, by_column: bool = False) -> Int8Embedding:
        """Returns an uninitialised twin of `embedding` on its device."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"):
            setattr(twin, name, getattr(embedding, name))
        twin.scale_grad_by_freq, twin.sparse = embedding.scale_grad_by_freq, embedding.sparse
        twin._start(embedding.weight, by_column)
        twin.train(embedding.training)
        return twin

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps integer [...] to `weight_dtype` [..., width]."""
        rows = ids.reshape(-1)
        vectors = dequantize_rows(
            self.codes[rows], self.weight_scale[rows], self.weight_dtype, self.weight_col_scale
        )
        return vectors.view(*ids.shape, self.embedding_dim)


def int8_twin(module: nn.Module, by_column: bool = False) -> Int8Linear | Int8Embedding | None:
    """Returns an uninitialised int8 module in place of a plain linear layer or embedding; None for anything else.

    Subclasses are left alone: they may do more than a product or a look-up. `by_column` makes room for scales of columns.
    """
    if type(module) is nn.Linear:
        return Int8Linear.from_linear(module, by_column)
    if type(module) is nn.Embedding and module.max_norm is None:
        return Int8Embedding.from_embedding(module, by_column)
    return None
