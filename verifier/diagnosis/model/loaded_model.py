"""Stage 3: modules and weights of the loaded model against weights of the verifier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Conv1D

from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError
from codecllm.formats.manifest.records import Int8Tensor, RawTensor
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.loader.resident.coded_weight import CodedWeight
from codecllm.loader.resident.int8_form import Int8Form
from codecllm.loader.resident.residency import is_by_rows
from codecllm.loader.resident.scaled_codes import ScaledCodes
from codecllm.verifier.diagnosis.causes import Cause
from codecllm.verifier.diagnosis.codes.rows import head_size
from codecllm.verifier.diagnosis.model.reference_model import codes_and_scales, source_tensor
from codecllm.verifier.diagnosis.model.weight_autopsy import Suspect, explain_weight, same_bits
from codecllm.verifier.report import Stage


@dataclass(frozen=True, slots=True)
class Comparison:
    """The partners of a comparison with a loaded model.

    Attributes:
        container: the container.
        source: the model it was made from.
        reference: the model class with weights that the reference decoded.
    """

    container: Container
    source: SourceModel
    reference: Any


def check_loaded_model(
    model: Any, resident: str, against: Comparison, stage: Stage
) -> dict[str, Any]:
    """Compares the weights that stay coded, scales, ties and every weight of a loaded model.

    Args:
        model: as the loader returned it.
        resident: `dense`, `int8` or `compressed`.
        against: the right model.
        stage: receives the findings.

    Returns:
        The figures of this residency as JSON values.
    """
    names = _tensor_names(against)
    coded_weights = {
        name.rpartition(".")[0]: weight
        for name, weight in model.named_parameters(remove_duplicate=False)
        if isinstance(weight, CodedWeight)
    }
    expected = _expected_modules(against, names, resident, coded_weights)
    renamed_modules = {
        name.rpartition(".")[0]
        for name, _ in against.reference.named_parameters(remove_duplicate=False)
        if resident != "dense" and name not in names
    }
    # The container's names of these weights are unknown here, and so whether they stay coded.
    weights_to_check = {
        name: weight
        for name, weight in coded_weights.items()
        if name not in renamed_modules - expected
    }
    _check_coded(model, resident, expected, weights_to_check, stage)
    for name, weight in coded_weights.items():
        if isinstance(weight.form, Int8Form):
            _check_scale(name, weight.form.matrix, stage)
    _check_ties(model, against.reference, stage)
    weights = _check_weights(model, against, names, stage)
    return {
        "resident": resident,
        "coded_expected": len(expected),
        "coded": len(coded_weights),
        "weights": weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def _tensor_names(against: Comparison) -> dict[str, str]:
    """Returns parameter name -> name of its tensor in the container.

    Shapes must be equal; the two names may differ by the prefix of the base model.
    """
    prefix = str(getattr(against.reference, "base_model_prefix", ""))
    shapes = {
        name: list(value.shape)
        for name, value in against.reference.state_dict(keep_vars=True).items()
    }
    tensor_names = {}
    for name, record in against.container.records.items():
        # A checkpoint of the base model loads into a class with a head, and the other way round.
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if shapes.get(candidate) == record.shape:
                tensor_names[candidate] = name
                break
    return tensor_names


def _expected_modules(
    against: Comparison, names: dict[str, str], resident: str, coded: Collection[str]
) -> set[str]:
    """Returns the names of the modules whose weight this residency keeps coded.

    Args:
        against: the right model.
        names: parameter name -> name of its tensor.
        resident: the residency.
        coded: names of the modules whose weight is coded.
    """
    if resident == "dense":
        return set()
    groups: dict[int, list[str]] = defaultdict(list)
    # Tied parameters share memory, so an address groups them.
    for name, value in against.reference.named_parameters(remove_duplicate=False):
        groups[value.data_ptr()].append(name)
    tied_names = {name: members for members in groups.values() for name in members}
    expected: set[str] = set()
    for name, tensor in names.items():
        record = against.container.stored_record(tensor)
        # Kernels for coded weights read rows; every other tensor is decoded at load.
        if isinstance(record, RawTensor) or not is_by_rows(record):
            continue
        if resident == "int8" and not isinstance(record, Int8Tensor):
            continue
        # With many codes beyond 8 bits it is loaded dense.
        may_be_dense = resident == "int8" and isinstance(record, Int8Tensor) and record.wide
        # The owners of a tied weight share one coded weight, under each of its names.
        for member in tied_names.get(name, []):
            owner = member.rpartition(".")[0]
            module = against.reference.get_submodule(owner)
            keeps = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
            if keeps and (owner in coded or not may_be_dense):
                expected.add(owner)
    return expected


def _check_coded(
    model: Any, resident: str, expected: set[str], coded: dict[str, CodedWeight], stage: Stage
) -> None:
    """Checks that the weights of the expected modules, and no others, are coded."""
    present = dict(model.named_modules(remove_duplicate=False))
    for name in sorted(expected):
        inside = [other for other in coded if other.startswith(f"{name}.")]
        form = coded[name].form if name in coded else None
        if inside:
            kinds = ", ".join(type(present[other]).__name__ for other in inside)
            text = f"module is {type(present[name]).__name__} around {kinds}: replaced twice"
            _fail(stage, name, Cause.REPLACED_TWICE, text)
        elif form is None or form.kind != resident:
            got = type(present[name]).__name__ if name in present else "nothing"
            weight = getattr(present.get(name), "weight", None)
            _fail(
                stage,
                name,
                Cause.NOT_REPLACED,
                f"resident {resident!r} keeps this weight coded",
                got=f"{got} with {type(weight).__name__}",
                expected=f"a form of {resident!r}",
            )
    for name in sorted(coded.keys() - expected):
        if not any(name.startswith(f"{other}.") for other in expected):
            _fail(
                stage,
                name,
                Cause.REPLACED_TWICE,
                f"resident {resident!r} does not keep this weight coded, and it is",
            )


def _check_scale(name: str, matrix: ScaledCodes, stage: Stage) -> None:
    """Checks type, shape, device and values of the scales of an int8 weight."""
    scale, codes = matrix.scale, matrix.codes
    facts = [
        ("dtype of the scales", scale.dtype, torch.float32, Cause.ROUNDED_SCALES),
        (
            "shape of the scales (one per row of the codes)",
            list(scale.shape),
            [codes.shape[0]],
            Cause.SCALE_AXIS,
        ),
        ("device of the scales", scale.device, codes.device, Cause.WRONG_SCALE),
        ("dtype of the codes", codes.dtype, torch.int8, Cause.WRONG_WEIGHT),
    ]
    if not torch.isfinite(scale).all():
        channel = int((~torch.isfinite(scale.reshape(-1))).nonzero()[0])
        text = (
            f"scale of channel {channel} is {float(scale.reshape(-1)[channel])}, in {scale.dtype}"
        )
        _fail(stage, name, Cause.SCALE_OVERFLOW, text, channel=channel)
    columns = matrix.col_scale
    if columns is not None:
        facts += [
            ("dtype of the scales of columns", columns.dtype, torch.float32, Cause.ROUNDED_SCALES),
            (
                "shape of the scales of columns",
                list(columns.shape),
                [codes.shape[1]],
                Cause.SCALE_AXIS,
            ),
            ("device of the scales of columns", columns.device, codes.device, Cause.WRONG_SCALE),
        ]
    for what, got, expected, cause in facts:
        if got != expected:
            _fail(stage, name, cause, what, got=got, expected=expected)


def _check_ties(model: Any, reference: Any, stage: Stage) -> None:
    """Checks that parameters share memory where the right model's do, and only there."""

    def groups(which: Any) -> dict[str, int]:
        return {
            name: _memory(which, name)
            for name, _ in reference.named_parameters(remove_duplicate=False)
        }

    right = groups(reference)
    places = groups(model)
    partners: dict[int, list[str]] = defaultdict(list)
    for name, place in right.items():
        partners[place].append(name)
    for members in partners.values():
        if len({places[name] for name in members}) > 1:
            _fail(
                stage,
                members[1],
                Cause.NOT_TIED,
                f"not tied to {members[0]!r}: each has memory of its own",
            )
    owners: dict[int, str] = {}
    for name, place in places.items():
        other = owners.setdefault(place, name)
        if place and other != name and right[other] != right[name]:
            _fail(
                stage,
                name,
                Cause.NOT_TIED,
                f"shares memory with {other!r}, and the model does not tie them",
            )


def _memory(model: Any, name: str) -> int:
    """Returns a number that tied parameters share; 0 where there is no memory."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return 0
    value = getattr(module, leaf, None)
    if isinstance(value, CodedWeight):
        return id(value)
    return (
        value.data_ptr()
        if isinstance(value, torch.Tensor) and not value.is_meta and value.numel()
        else 0
    )


def _check_weights(model: Any, against: Comparison, names: dict[str, str], stage: Stage) -> int:
    """Compares every parameter and persistent buffer bit for bit; returns how many."""
    right = against.reference.state_dict(keep_vars=True)
    weights = 0
    tied_keys = set[tuple[int, str]]()
    for name, value in right.items():
        loaded_value = _loaded_value(model, name)
        # Both addresses: a tie that only one of the models has must not hide the other's copy.
        key = (value.data_ptr(), str(_memory(model, name)))
        if key in tied_keys and value.numel():
            continue  # tied, and compared under its first name
        tied_keys.add(key)
        if loaded_value is None:
            if not _blamed(stage, name):
                _fail(stage, name, Cause.NOT_REPLACED, "the loaded model lacks this parameter")
        elif loaded_value.is_meta:
            _fail(stage, name, Cause.ON_META, "the parameter is on the meta device: it has no data")
        else:
            weights += 1
            # Bits are compared on the CPU, where the reference lies: one weight at a time.
            cpu = loaded_value.detach().cpu()
            if not same_bits(cpu, value.detach()):
                _explain(cpu, name, value.detach(), model, against, names, stage)
    return weights


def _loaded_value(model: Any, name: str) -> torch.Tensor | None:
    """Returns a parameter or buffer of the loaded model, coded or not."""
    owner, _, leaf = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), leaf, None)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def _explain(
    weight: torch.Tensor,
    name: str,
    right: torch.Tensor,
    model: Any,
    against: Comparison,
    names: dict[str, str],
    stage: Stage,
) -> None:
    # A wrong dtype is one fault; after the cast the values may hold another.
    if weight.dtype != right.dtype:
        _fail(
            stage,
            name,
            Cause.WRONG_WEIGHT,
            "dtype of the weight",
            got=weight.dtype,
            expected=right.dtype,
        )
        weight = weight.to(right.dtype)
        if same_bits(weight, right):
            return
    codes = scales = source = None
    tensor = names.get(name)
    if tensor is not None:
        stored_tensor = against.container.tensor(tensor)
        if isinstance(stored_tensor, StoredTensor) and isinstance(stored_tensor.record, Int8Tensor):
            codes, scales = codes_and_scales(stored_tensor)
        if tensor in against.source.tensors:
            source = source_tensor(against.source.tensors[tensor])

    def others(value: torch.Tensor) -> str | None:
        return next((other for other in _alike(against.reference, value) if other != name), None)

    if _blamed(stage, name):
        return
    head = head_size(getattr(model, "config", None))
    explanation = explain_weight(Suspect(name, weight, right, codes, scales, source, head, others))
    error = ModelMismatchError(explanation.text, tensor=tensor or name)
    stage.fail(
        error, cause=explanation.cause, channel=explanation.channel, module=name.rpartition(".")[0]
    )


def _blamed(stage: Stage, name: str) -> bool:
    """Tells whether a finding names the parameter's module already.

    A fault of the module's structure explains its weight.
    """
    return any(finding.module == name.rpartition(".")[0] for finding in stage.findings)


def _alike(reference: Any, value: torch.Tensor) -> Iterator[str]:
    for name, other in reference.named_parameters():
        if other.shape == value.shape and same_bits(other.detach(), value):
            yield name


def _fail(
    stage: Stage, name: str, cause: Cause, text: str, *, channel: int | None = None, **facts: Any
) -> None:
    error = ModelMismatchError(f"module {name!r}: {text}", **facts)
    stage.fail(error, cause=cause, channel=channel, module=name.removesuffix(".weight"))
