"""Fused experts of vLLM whose weights stay codes.

vLLM's kernels for experts take codes of 8 bits, but not as a container means them: on a CPU they
round the inputs to 8 bits too, on a GPU they do not know scales of columns. So on a CPU each expert
that tokens chose multiplies them, one after another, by the products of linear layers; which ones
were chosen is read back at every layer. A GPU has a kernel for all of them, which a CUDA graph can
record; it takes no codes beyond 8 bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from codecllm.loader.device.codecs import why_no_kernels
from codecllm.serving import vllm_names
from codecllm.serving.coded_matrix import coded_product, make_matrix, unborn
from codecllm.serving.codes_plan import CodedLayer, CodesPlan
from codecllm.serving.unfilled import COUNTED
from codecllm.serving.vllm_codes import STATE, Filling, Loader, counted

_MATRICES = 3
"""Of an expert: gate, up and down."""


def plan_experts(plan: CodesPlan, layer: Any, prefix: str) -> CodedLayer | None:
    """Returns how a layer of experts is filled; None: dense."""
    device = vllm_names.platform_device()
    by_kernel = device.type != "cpu"
    if not vllm_names.is_plain_experts(layer) or (by_kernel and not _has_kernel(layer, device)):
        return None
    hidden, inner = layer.moe_config.hidden_dim, layer.moe_config.intermediate_size
    members = {
        layer.ckpt_gate_proj_name: (inner, hidden),
        layer.ckpt_up_proj_name: (inner, hidden),
        layer.ckpt_down_proj_name: (hidden, inner),
    }
    return plan.experts(
        prefix,
        members,
        layer.moe_config.num_experts,
        vllm_names.local_experts(layer),
        takes_wide=not by_kernel,
    )


def _has_kernel(layer: Any, device: torch.device) -> bool:
    is_short = layer.moe_config.in_dtype in (torch.bfloat16, torch.float16)
    return is_short and why_no_kernels(device) is None


class ExpertCodes(vllm_names.FusedMoEMethodBase):
    """The method of a layer of experts."""

    def __init__(self, coded: CodedLayer, moe: Any) -> None:
        """Keeps what fills the layer."""
        super().__init__(moe)
        self._coded = coded

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Registers codes, scales and, where needed, scales of columns, of all experts here.

        `w13_*` are gates and, behind them, ups; `w2_*` are downs.
        """
        inner = intermediate_size_per_partition
        dtype = torch.int16 if self._coded.wide else torch.int8
        setattr(layer, STATE, Filling(self._coded, [inner], dtype, params_dtype, _complete))
        load = _local(layer, extra["weight_loader"])
        for name, rows, cols in (("w13", 2 * inner, hidden_size), ("w2", hidden_size, inner)):
            parts = {
                f"{name}_weight": unborn((num_experts, rows, cols), dtype),
                f"{name}_weight_scale": torch.ones(num_experts, rows),
            }
            for part, data in parts.items():
                _register(layer, part, data, load)
            if self._coded.has_columns:
                data = torch.ones(num_experts, 2 if name == "w13" else 1, cols)
                _register(
                    layer,
                    f"{name}_weight_col_scale",
                    data,
                    _local(layer, functools.partial(_load_columns, layer)),
                )
        vllm_names.prepare_cpu(torch.get_default_device())

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """Returns None: no kernel of vLLM is used."""
        del layer

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the weighted sum over each token's experts that are here, [tokens, hidden].

        Args:
            layer: the experts.
            x: [tokens, hidden].
            topk_weights: [tokens, chosen].
            topk_ids: [tokens, chosen], numbers of experts of all ranks.
            shared_experts: computed by the caller.
            shared_experts_input: likewise.
        """
        del shared_experts, shared_experts_input
        matrices = getattr(layer, STATE).matrices
        numbers = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        if x.device.type != "cpu":
            return _by_kernel(layer, x, topk_weights, numbers)
        result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number in numbers.unique().tolist():
            if number < 0:  # held by another rank
                continue
            token, choice = (numbers == number).nonzero(as_tuple=True)
            gate, up, down = matrices[_MATRICES * number : _MATRICES * (number + 1)]
            inputs = x[token]
            both = [coded_product(inputs, None, one) for one in (gate, up)]
            inner = vllm_names.activate(layer.activation, torch.cat(both, dim=-1))
            share = topk_weights[token, choice, None].to(torch.float32)
            result.index_add_(0, token, coded_product(inner, None, down) * share)
        return result.to(x.dtype)


def _by_kernel(
    layer: Any, x: torch.Tensor, shares: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    from codecllm.loader.kernels.int8_experts import experts_mlp

    activate = functools.partial(vllm_names.activate, layer.activation)
    gate_up, down = getattr(layer, STATE).matrices
    return experts_mlp(x, numbers, shares, gate_up, down, activate)


def _register(layer: torch.nn.Module, name: str, data: torch.Tensor, load: Any) -> None:
    parameter = torch.nn.Parameter(data, requires_grad=False)
    attributes = {"weight_loader": load, "quant_method": vllm_names.PER_CHANNEL, COUNTED: True}
    for attribute, value in attributes.items():
        setattr(parameter, attribute, value)
    layer.register_parameter(name, parameter)


def _local(layer: Any, load: Loader) -> Loader:
    """Wraps a loader of experts: parts of experts that other ranks hold do not count."""
    load_counted = counted(layer, load)

    def load_local(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        if vllm_names.local_number(layer, expert_id) < 0:
            return False
        return load_counted(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

    return load_local


def _load_columns(
    layer: Any,
    param: torch.nn.Parameter,
    loaded: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool:
    """Puts scales of columns of one matrix of one expert in their place."""
    del weight_name, return_success
    number = vllm_names.local_number(layer, expert_id)
    width = param.shape[2]
    if loaded.shape[0] != width:  # cut by columns
        loaded = loaded.narrow(0, layer.moe_config.tp_rank * width, width)
    param.data[number, 1 if shard_id == "w3" else 0] = loaded
    return True


def _complete(layer: Any, filling: Filling) -> None:
    """Makes the matrices of all experts here; for the kernel, of all of them together."""
    if layer.w13_weight.device.type != "cpu":
        from codecllm.loader.kernels.expert_codes import ExpertCodes as Stacked

        filling.matrices = [
            Stacked(
                getattr(layer, f"{name}_weight").data,
                getattr(layer, f"{name}_weight_scale").data,
                getattr(layer, f"{name}_weight_col_scale").data
                if filling.coded.has_columns
                else None,
            )
            for name in ("w13", "w2")
        ]
        return
    inner, dtype = filling.sizes[0], filling.params_dtype
    columns: Any = (None, None)
    if filling.coded.has_columns:
        columns = (layer.w13_weight_col_scale.data, layer.w2_weight_col_scale.data)
    places = (("w13", slice(0, inner), 0), ("w13", slice(inner, None), 1), ("w2", slice(None), 0))
    for number in range(len(layer.w13_weight)):
        for name, rows, index in places:
            of_columns = columns[name == "w2"]
            filling.matrices.append(
                make_matrix(
                    getattr(layer, f"{name}_weight").data[number, rows],
                    getattr(layer, f"{name}_weight_scale").data[number, rows],
                    None if of_columns is None else of_columns[number, index],
                    dtype,
                )
            )
    if filling.dtype != torch.int8:
        for weight in (layer.w13_weight, layer.w2_weight):
            # The matrices have memory of their own; see `vllm_codes`.
            weight.data = unborn(weight.shape, torch.int8, weight.device)
