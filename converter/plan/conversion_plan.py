"""The plan of a conversion.

Scheme, alias and shard of every tensor, decided before a byte is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from codecllm.converter.options import ConvertOptions
from codecllm.converter.plan.policy import plan_tensor
from codecllm.converter.plan.side_names import without_clashes
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.source.aliases import find_aliases
from codecllm.converter.source.source import SourceModel
from codecllm.formats import BASE_VERSION, FORMAT_VERSION, STEPS_VERSION
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.manifest import CODE_SUFFIX, source_features
from codecllm.formats.shards.shard_writer import PlannedTensor

# Room in a shard's header for one tensor, where shards are cut.
_ENTRY_BYTES = 512
_SHARDS, _LEAST_SHARD_BYTES = 16, 500_000_000  # a smaller shard is hashed in half a second


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """All decisions of a conversion.

    Attributes:
        shards: plans of the tensors of each shard, in order.
        aliases: name -> name of the tensor whose bytes it shares.
        warnings: sentences for the user.
        format_version: the lowest version of the format above 1.0 that can describe the container.
    """

    shards: list[list[TensorPlan]]
    aliases: dict[str, str]
    warnings: list[str]
    format_version: str

    @property
    def tensors(self) -> list[TensorPlan]:
        """All stored tensors in order."""
        return [plan for shard in self.shards for plan in shard]

    @property
    def max_stored_bytes(self) -> int:
        """Upper bound of the output without side files and fallbacks."""
        return sum(plan.max_stored_bytes for plan in self.tensors)


def open_source(folder: str | Path, options: ConvertOptions) -> SourceModel:
    """Opens the source of a conversion with these options. Errors as `SourceModel`."""
    return SourceModel(folder, view=options.scheme, with_code=options.with_code)


def plan_conversion(
    model: SourceModel, options: ConvertOptions, *, accepts_params: bool = False
) -> ConversionPlan:
    """Decides scheme, alias and shard of every tensor of an opened source.

    Args:
        model: the source.
        options: of the conversion.
        accepts_params: whether int8 tensors may get chosen quantization parameters.
    """
    plans = without_clashes(
        [
            plan_tensor(tensor, options, model.model_type, accepts_params=accepts_params)
            for tensor in model.tensors.values()
        ]
    )
    # Equal bytes share storage only under equal plans, so the plans come first.
    aliases = find_aliases(plans)
    warnings = [*model.notes, *_remarks(model, options)]
    warnings += _unmatched("--include", options.include, model)
    warnings += _unmatched("--exclude", options.exclude, model)
    stored_plans = [plan for plan in plans if plan.source.name not in aliases]
    shards = _place(stored_plans, options.max_shard_bytes)
    return ConversionPlan(shards, aliases, warnings, _format_version(model, accepts_params))


def planned_entries(plans: list[TensorPlan]) -> list[PlannedTensor]:
    """Returns the entries that the header of a shard may have to hold, each at its longest."""
    entries = []
    for plan in plans:
        source = plan.source
        # A tensor that coding does not shrink is stored raw after all.
        bound = max(plan.max_stored_bytes, source.entry.bytes)
        if plan.scheme == "raw":
            entries.append(PlannedTensor(source.name, source.dtype, source.shape, bound))
            continue
        entries.append(PlannedTensor(source.name, DTYPES["U8"], (bound,), bound))
        layout = plan.longest_layout
        for side in plan.possible_sides:
            length = side.length(layout)
            shape = (bound if length is None else length,)
            dtype = DTYPES[side.dtype(layout)]
            entries.append(PlannedTensor(side.name_for(source.name), dtype, shape, 0))
    return entries


def _remarks(model: SourceModel, options: ConvertOptions) -> list[str]:
    """Returns sentences about files that the container will lack, or has from elsewhere."""
    remarks = []
    if model.config is None:
        remarks.append("the source has no config.json: it cannot be loaded as a model")
    side_files = model.side_files
    if side_files.linked:
        remarks.append(
            f"{len(side_files.linked)} copied files are links to places outside the source's "
            "folder, "
            f"first {side_files.linked[0]}"
        )
    if options.with_code and not any(name.endswith(CODE_SUFFIX) for name in side_files.copied):
        remarks.append("--with-code: the source holds no Python files")
    if not options.with_code and model.names_code:
        remarks.append(
            f"the config names code of the repository (auto_map): {len(side_files.code)} Python "
            "files are left out; "
            "--with-code copies them"
        )
    return remarks


def _format_version(model: SourceModel, accepts_params: bool) -> str:
    if source_features(model.side_files.copied, model.quantization_method):
        return FORMAT_VERSION
    # The lowest version that describes the container, so that older readers can read it.
    return STEPS_VERSION if accepts_params else BASE_VERSION


def _unmatched(option: str, patterns: Sequence[str], model: SourceModel) -> list[str]:
    return [
        f"{option} {pattern!r} matches no tensor"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in model.tensors)
    ]


def _place(plans: list[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Cuts the tensors into shards by upper bounds of their sizes.

    Names must be known before anything is written. A large model has 16 shards or more: the sha256
    of a file is the work of one thread, and begins when its last byte is written.
    """
    total = sum(plan.max_stored_bytes + _ENTRY_BYTES for plan in plans)
    max_shard_bytes = min(max_shard_bytes, max(_LEAST_SHARD_BYTES, total // _SHARDS))
    shards: list[list[TensorPlan]] = [[]]
    shard_bytes = 0
    for plan in plans:
        size = plan.max_stored_bytes + _ENTRY_BYTES
        if shards[-1] and shard_bytes + size > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(plan)
        shard_bytes += size
    return shards
