"""Layers of vLLM whose weights stay codes or packed: how they are filled, how they multiply.

vLLM's own loaders fill the parameters: they fuse q, k and v, cut by ranks and repeat heads. Once a
layer has all of its parts they are packed, or its codes of 16 bits, if any, are narrowed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from codecllm.formats.errors import ModelMismatchError
from codecllm.loader.resident.scaled_codes import ScaledCodes
from codecllm.serving import vllm_names
from codecllm.serving.coded_matrix import (
    coded_product,
    coded_rows,
    make_matrix,
    pack_weights,
    unborn,
)
from codecllm.serving.codes_plan import CodedLayer
from codecllm.serving.unfilled import COUNTED

Loader = Callable[..., bool | None]
_SHARDS = {"q": 0, "k": 1, "v": 2}
STATE = "codecllm"
"""Attribute of a layer with codes: its `Filling`."""


@dataclass(slots=True)
class Filling:
    """The parameters of one layer while it is filled.

    Attributes:
        coded: what fills it.
        sizes: rows of each logical matrix on this rank.
        dtype: of what fills it: int8, int16 where one of the matrices is wide, or bfloat16.
        params_dtype: dtype of the layer's weights, were they dense.
        taken: how many tensors have come.
        matrices: the result, each a `Matrix` or, of experts, what their product takes; a linear
            layer whose output is one product has one.
        complete: makes it, once all tensors have come.
    """

    coded: CodedLayer
    sizes: list[int]
    dtype: torch.dtype
    params_dtype: torch.dtype
    complete: Callable[[Any, Filling], None]
    taken: int = 0
    matrices: list[Any] = field(default_factory=list)


def check_filled(layers: list[torch.nn.Module]) -> None:
    """Raises an error where a layer did not get all of its parts.

    Raises:
        ModelMismatchError: codes were handed over that the layer never got.
    """
    for layer in layers:
        filling: Filling | None = getattr(layer, STATE, None)  # a tied head may have none
        if filling is not None and not filling.matrices:
            raise ModelMismatchError(
                "the layer did not get all of its codes and scales",
                tensor=filling.coded.name,
                got=filling.taken,
                expected=filling.coded.parts,
            )


class CodesMethod:
    """What linear layers and embeddings with codes have in common."""

    def __init__(self, coded: CodedLayer) -> None:
        """Keeps what fills the layer."""
        self._coded = coded

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Registers `weight`, `weight_scale` and, where needed, `weight_col_scale`."""
        del input_size, output_size
        cols, sizes = input_size_per_partition, list(output_partition_sizes)
        dtype = torch.int16 if self._coded.wide else torch.int8
        if self._coded.is_weights:
            dtype = params_dtype
        setattr(layer, STATE, Filling(self._coded, sizes, dtype, params_dtype, _complete))
        parts = {"weight": unborn((sum(sizes), cols), dtype)}
        if not self._coded.is_weights:
            parts["weight_scale"] = torch.ones(sum(sizes), dtype=torch.float32)
        load = counted(layer, extra.pop("weight_loader"))
        is_linear = isinstance(layer, vllm_names.LinearBase)
        for name, data in parts.items():
            parameter = vllm_names.parameter_by_rows(data, load, is_linear=is_linear)
            layer.register_parameter(name, parameter)
        if self._coded.has_columns:
            columns = torch.nn.Parameter(
                torch.ones(len(sizes), cols, dtype=torch.float32), requires_grad=False
            )
            columns.weight_loader = counted(  # type: ignore[attr-defined]
                layer, functools.partial(_load_columns, layer)
            )
            layer.register_parameter("weight_col_scale", columns)
        for parameter in layer.parameters(recurse=False):
            setattr(parameter, COUNTED, True)
        vllm_names.prepare_cpu(parts["weight"].device)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns `x @ weight.T + bias`."""
        filling: Filling = getattr(layer, STATE)
        matrices = filling.matrices
        if len(matrices) == 1:
            return coded_product(x, bias, matrices[0])
        biases: list[torch.Tensor | None] = [None] * len(matrices)
        if bias is not None:
            biases = list(bias.split(filling.sizes))
        products = [coded_product(x, part, one) for part, one in zip(biases, matrices, strict=True)]
        return torch.cat(products, dim=-1)


@vllm_names.register_weight_loader_v2_supported_method
class LinearCodes(CodesMethod, vllm_names.LinearMethodBase):
    """The method of a linear layer."""


class EmbeddingCodes(CodesMethod, vllm_names.QuantizeMethodBase):
    """The method of an embedding or a head."""

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Returns rows of the weight for token ids."""
        filling: Filling = getattr(layer, STATE)
        return coded_rows(input_, filling.params_dtype, filling.matrices[0])

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Returns the layer, a head, with the weights of the embedding."""
        layer.quant_method = embed_tokens.quant_method
        for name in ("weight", "weight_scale", "weight_col_scale"):
            layer._parameters.pop(name, None)
            if hasattr(embed_tokens, name):
                setattr(layer, name, getattr(embed_tokens, name))
        if hasattr(embed_tokens, STATE):
            setattr(layer, STATE, getattr(embed_tokens, STATE))
        else:
            delattr(layer, STATE)
        return layer


def counted(layer: Any, load: Loader) -> Loader:
    """Wraps a parameter's loader: the first part makes memory, the last one completes the layer."""

    def counting(
        param: torch.nn.Parameter, loaded_weight: torch.Tensor, *place: Any, **named: Any
    ) -> bool | None:
        filling: Filling = getattr(layer, STATE)
        if filling.matrices:
            raise ModelMismatchError("weights came twice", tensor=filling.coded.name)
        if param.dtype.is_floating_point != loaded_weight.dtype.is_floating_point:
            raise ModelMismatchError(
                "got other parts than the layer was made for",
                tensor=filling.coded.name,
                got=loaded_weight.dtype,
                expected=param.dtype,
            )
        if not filling.taken:
            for codes in layer.parameters(recurse=False):
                if (
                    hasattr(codes, COUNTED) and codes.dtype == filling.dtype
                ):  # a bias does not count
                    codes.data = torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)
        done = load(param, loaded_weight, *place, **named)
        filling.taken += 1
        if filling.taken == filling.coded.parts:
            filling.complete(layer, filling)
        return done

    return counting


def _load_columns(
    layer: Any, param: torch.nn.Parameter, loaded: torch.Tensor, shard: Any = None
) -> None:
    """Puts scales of columns into the rows of the logical matrices that `shard` names."""
    width = param.shape[1]
    if loaded.shape[0] != width:  # cut by columns
        loaded = loaded.narrow(0, layer.tp_rank * width, width)
    if shard is None:
        param.data[:] = loaded
    else:
        param.data[_SHARDS[shard] if isinstance(shard, str) else shard] = loaded


def _complete(layer: Any, filling: Filling) -> None:
    """Makes the matrices of a layer of its parameters, and lets go of what they do not use."""
    if filling.coded.is_weights:
        filling.sizes = [sum(filling.sizes)]
        filling.matrices = [pack_weights(layer.weight.data)]
        if not isinstance(filling.matrices[0], torch.Tensor):
            layer.weight.data = unborn(layer.weight.shape, filling.dtype, layer.weight.device)
        return
    columns = layer.weight_col_scale.data if filling.coded.has_columns else None
    if columns is None or all(torch.equal(row, columns[0]) for row in columns[1:]):
        filling.sizes = [sum(filling.sizes)]
    blocks = layer.weight.data.split(filling.sizes)
    scales = layer.weight_scale.data.split(filling.sizes)
    filling.matrices = [
        make_matrix(
            codes,
            scale,
            None if columns is None else columns[index],
            filling.params_dtype,
            packs=filling.coded.packs,
        )
        for index, (codes, scale) in enumerate(zip(blocks, scales, strict=True))
    ]
    if not any(isinstance(one, ScaledCodes) for one in filling.matrices) or (
        filling.dtype != torch.int8
    ):
        # The matrices have memory of their own; the parameter stays for those who ask its shape.
        layer.weight.data = unborn(layer.weight.shape, torch.int8, layer.weight.device)
