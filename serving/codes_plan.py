"""Which layers of an engine's model keep codes or packed weights, by their weights' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.formats.manifest.records import (
    AliasTensor,
    CodedTensor,
    Int8Tensor,
    LosslessTensor,
)
from codecllm.loader.packed.matrix import can_pack
from codecllm.serving.checkpoint import holds_codes

_WEIGHT = ".weight"
_EMBEDDING = "embed_tokens"
_DENSE_LAYERS = ("kv_b_proj",)
"""Layers of which engines read the weight itself: attention multiplies it with others."""


@dataclass(frozen=True, slots=True)
class CodedLayer:
    """What fills a layer.

    Attributes:
        name: of the layer.
        parts: tensors of the checkpoint, scales included.
        wide: whether one of its matrices has codes of 16 bits.
        has_columns: whether one of them has scales of columns.
        packs: whether its matrices are packed once they are complete.
        is_weights: whether they come as bfloat16 weights, not as codes.
    """

    name: str
    parts: int
    wide: bool
    has_columns: bool
    packs: bool = False
    is_weights: bool = False


_INT8_NEEDS = "resident 'int8' needs an int8 container; this one holds no codes by rows"
_PACKED_NEEDS = (
    "resident 'packed' needs matrices of codes by rows, or lossless ones of BF16 whose columns are "
    "a multiple of 16; this container holds none"
)


class CodesPlan:
    """The tensors of a container that layers keep as codes, or as packed weights.

    A layer decides when it is made; until then none of its tensors is kept so.

    Attributes:
        names: checkpoint names of tensors that layers have asked for as codes.
    """

    def __init__(self, container: Container, *, packs: bool = False) -> None:
        """Looks at the records.

        Args:
            container: an opened container.
            packs: whether layers pack what they keep, bfloat16 weights of lossless tensors too.

        Raises:
            UsageError: it holds nothing that a layer could keep.
        """
        self._packs = packs
        self._records: dict[str, CodedTensor] = {}
        for name, record in container.records.items():
            stored = record
            if isinstance(record, AliasTensor):
                stored = container.records[record.alias_of]
            if isinstance(stored, Int8Tensor | LosslessTensor) and (
                holds_codes(stored) or (packs and _is_packable(stored))
            ):
                self._records[name] = stored
        if not self._records:
            raise UsageError(_PACKED_NEEDS if packs else _INT8_NEEDS)
        self._all = set(container.records)
        self._by_engine_name = {name: name for name in container.records}
        self._embedding: CodedLayer | None = None
        self._has_dense_head = False
        self.names: set[str] = set()

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Learns how an engine renames the checkpoint's names; None: it ignores one."""
        for name in self._all:
            renamed = new_name(name)
            if renamed is not None:
                self._by_engine_name.setdefault(renamed, name)

    def linear(self, prefix: str, members: Iterable[str], columns: int) -> CodedLayer | None:
        """Returns how a linear layer is filled; None: dense, since not all members have codes.

        Args:
            prefix: the engine's name of the layer.
            members: last parts of the names of the matrices that it fuses, in their order.
            columns: of the whole matrix, of all ranks together.
        """
        parent, _, last = prefix.rpartition(".")
        if last in _DENSE_LAYERS:
            return None
        start = f"{parent}." if parent else ""
        # A checkpoint may hold the fused matrix itself.
        for choice in (list(members), [last]):
            names = [self._by_engine_name.get(f"{start}{member}{_WEIGHT}") for member in choice]
            records = [self._records.get(name or "") for name in names]
            fits = all(record is not None and record.shape[1] == columns for record in records)
            if fits and len({type(record) for record in records}) == 1:
                return self._keep(prefix, [name for name in names if name is not None])
        return None

    def experts(
        self,
        prefix: str,
        members: Mapping[str, tuple[int, int]],
        count: int,
        here: Iterable[int],
        *,
        takes_wide: bool = True,
    ) -> CodedLayer | None:
        """Returns how a layer of experts is filled; None: dense, since not all have codes.

        Args:
            prefix: the engine's name of the layer; experts of the checkpoint are numbered below it.
            members: last parts of the names of the matrices of an expert, and their shapes.
            count: of all experts.
            here: numbers of those that this rank holds.
            takes_wide: whether the layer can keep codes of 16 bits.
        """
        names, local, parts = [], set(here), 0
        for number in range(count):
            for member, shape in members.items():
                name = self._by_engine_name.get(f"{prefix}.{number}.{member}{_WEIGHT}")
                record = self._records.get(name or "")
                if name is None or not isinstance(record, Int8Tensor):
                    return None
                if tuple(record.shape) != shape or (record.wide and not takes_wide):
                    return None
                names.append(name)
                if number in local:
                    parts += 2 + (record.xxh3.col_scale is not None)
        return replace(self._keep(prefix, names), parts=parts)

    def embedding(self, prefix: str, shape: tuple[int, int]) -> CodedLayer | None:
        """Returns how an embedding [shape] is filled, or None: dense.

        Args:
            prefix: the engine's name of the layer; empty where the engine gives none.
            shape: of the whole matrix, without padding.
        """
        name = self._by_engine_name.get(prefix + _WEIGHT) if prefix else self._only_embedding()
        record = self._records.get(name or "")
        if name is None or record is None or tuple(record.shape) != shape or self._has_dense_head:
            return None
        self._embedding = self._keep(prefix or name.removesuffix(_WEIGHT), [name])
        return self._embedding

    def head(self, prefix: str, shape: tuple[int, int]) -> CodedLayer | None:
        """Returns how a head [shape] is filled, or None: dense. A head without weights is tied."""
        name = self._by_engine_name.get(prefix + _WEIGHT)
        if name is None:
            self._has_dense_head = self._embedding is None
            return self._embedding
        record = self._records.get(name)
        if record is None or tuple(record.shape) != shape:
            return None
        return self._keep(prefix, [name])

    def _only_embedding(self) -> str | None:
        found = [name for name in self._all if name.endswith(_EMBEDDING + _WEIGHT)]
        return found[0] if len(found) == 1 else None

    def _keep(self, prefix: str, names: list[str]) -> CodedLayer:
        records = [self._records[name] for name in names]
        coded = [record for record in records if isinstance(record, Int8Tensor)]
        if not coded:
            return CodedLayer(prefix, len(names), False, False, packs=True, is_weights=True)
        has_columns = [record.xxh3.col_scale is not None for record in coded]
        self.names.update(names)
        parts = 2 * len(coded) + sum(has_columns)
        wide = any(record.wide for record in coded)
        return CodedLayer(prefix, parts, wide, any(has_columns), packs=self._packs)


def _is_packable(record: CodedTensor) -> bool:
    """Whether a tensor holds a matrix of bfloat16 weights that has a packed form."""
    is_bf16 = isinstance(record, LosslessTensor) and record.dtype == "BF16"
    return is_bf16 and len(record.shape) == 2 and can_pack(*record.shape)
