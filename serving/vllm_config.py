"""The quantization config that vLLM makes for `quant_method: codecllm` of config.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from codecllm.formats.errors import UsageError
from codecllm.serving.loading import NAME, MethodFacts
from codecllm.serving.vllm_names import (
    LinearBase,
    ParallelLMHead,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    new_name_of,
)

if TYPE_CHECKING:
    from codecllm.serving.codes_plan import CodesPlan


class Building:
    """A model that `CodecLLMLoader` builds.

    Attributes:
        plan: which layers keep codes; None: none does.
        layers: those that were made.
    """

    def __init__(self, plan: CodesPlan | None) -> None:
        """Begins without layers."""
        self.plan = plan
        self.layers: list[torch.nn.Module] = []


_building: ContextVar[Building | None] = ContextVar("codecllm_building", default=None)


class CodecLLMConfig(MethodFacts, QuantizationConfig):
    """Gives layers their methods while `CodecLLMLoader` builds a model, and refuses otherwise.

    Another loader would fill parameters with stored bytes.
    """

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Returns the method of a layer; None leaves the choice to the layer.

        Raises:
            UsageError: another loader builds the model.
        """
        building = _building.get()
        if building is None:
            raise UsageError(
                f"a codecllm container is read by --load-format {NAME}; for a draft model give "
                f'"draft_load_config": {{"load_format": "{NAME}"}}'
            )
        method = None if building.plan is None else self._codes(building.plan, layer, prefix)
        if method is not None:
            building.layers.append(layer)
            return method
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learns how a model renames the checkpoint's names."""
        building = _building.get()
        if building is not None and building.plan is not None:
            building.plan.rename(new_name_of(hf_to_vllm_mapper))

    def _codes(
        self, plan: CodesPlan, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """Returns the method of a layer that keeps codes, or None."""
        from codecllm.serving.vllm_codes import EmbeddingCodes, LinearCodes

        if isinstance(layer, LinearBase):
            last = prefix.rpartition(".")[2]
            members = self.packed_modules_mapping.get(last, [last])
            linear = plan.linear(prefix, members, layer.input_size)
            return None if linear is None else LinearCodes(linear)
        if isinstance(layer, VocabParallelEmbedding):
            find = plan.head if isinstance(layer, ParallelLMHead) else plan.embedding
            matrix = find(prefix, (layer.org_vocab_size, layer.embedding_dim))
            return None if matrix is None else EmbeddingCodes(matrix)
        if isinstance(layer, RoutedExperts):
            from codecllm.serving.vllm_experts import ExpertCodes, plan_experts

            experts = plan_experts(plan, layer, prefix)
            return None if experts is None else ExpertCodes(experts, layer.moe_config)
        return None


@contextmanager
def building(plan: CodesPlan | None) -> Iterator[Building]:
    """Lets configs give methods: `CodecLLMLoader` builds a model inside."""
    state = Building(plan)
    token = _building.set(state)
    try:
        yield state
    finally:
        _building.reset(token)
