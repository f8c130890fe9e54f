"""The report that transformers gives of a plain load of the source, recorded in the container.

Many checkpoints hold heads that their class does not use, or lack some that it has: transformers
warns and goes on. A load of the container that reports the same is as good as a load of the source.
Anything else is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from codecllm.formats.container import Container
from codecllm.formats.errors import ModelMismatchError, SchemaError
from codecllm.formats.manifest.manifest import LOAD_REPORT_NAME
from codecllm.formats.strict_json import parse_json_object

MAX_BYTES = 16 << 20
NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The weights that a load leaves over.

    Attributes:
        model_class: name of the class that was loaded.
        missing: parameters for which there is no tensor; they are initialised at random.
        unexpected: tensors for which the class has no parameter.
    """

    model_class: str
    missing: frozenset[str]
    unexpected: frozenset[str]

    @classmethod
    def of(cls, model_class: str, missing: Iterable[str], unexpected: Iterable[str]) -> LoadReport:
        """Makes a report from names in any order."""
        return cls(model_class, frozenset(missing), frozenset(unexpected))

    @property
    def is_empty(self) -> bool:
        """Whether the tensors are exactly those of the class."""
        return not self.missing and not self.unexpected

    def require_within(self, expected: LoadReport) -> None:
        """Compares this load with the recorded load of the source.

        Raises:
            ModelMismatchError: it leaves over something that the source's load does not.
        """
        # Fewer names are no fault: another version of transformers may use more of the tensors.
        faults = _listed(self.missing - expected.missing, self.unexpected - expected.unexpected)
        if faults:
            raise ModelMismatchError(
                f"the container's tensors are not those of {self.model_class}; {faults}"
            )

    def summary(self) -> str:
        """Returns one line for people, empty where nothing is left over."""
        words = _listed(self.missing, self.unexpected)
        return f"as {self.model_class}: {words}" if words else ""


def draws_most(model: Any, missing: Iterable[str]) -> bool:
    """Whether a model is at random for the greater part: it lacks most numbers of its parameters.

    Args:
        model: a `torch.nn.Module`; its parameters may be on the meta device.
        missing: names of the parameters for which there was no tensor.
    """
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    lacking = sum(sizes.get(name, 0) for name in missing)
    return bool(2 * lacking > sum(sizes.values()))


def draws_all(model: Any, missing: Iterable[str]) -> bool:
    """Whether a model finds none of its parameters; see `draws_most`."""
    names = {name for name, _ in model.named_parameters()}
    return bool(names) and names.issubset(missing)


def pack_report(report: LoadReport) -> bytes:
    """Returns the bytes of `load_report.json`."""
    # Sorted: equal reports have equal bytes, whatever the order of sets.
    document = {
        "format": "codecllm-load-report",
        "version": 1,
        "class": report.model_class,
        "missing": sorted(report.missing),
        "unexpected": sorted(report.unexpected),
    }
    return (json.dumps(document) + "\n").encode()


def read_report(container: Container) -> LoadReport | None:
    """Reads the container's report; None where it has none.

    Raises:
        SchemaError: it is not a report as this version writes it.
        FormatError: its bytes are not those that the manifest lists.
    """
    record = container.manifest.file(LOAD_REPORT_NAME)
    if record is None:
        return None
    data = container.read_side_file(record)
    document = parse_json_object(data, file=LOAD_REPORT_NAME, max_bytes=MAX_BYTES)
    names = [document.get(key) for key in ("missing", "unexpected")]
    is_known = document.get("format") == "codecllm-load-report" and document.get("version") == 1
    if not is_known or not isinstance(document.get("class"), str) or not all(map(_is_names, names)):
        raise SchemaError("not a load report of version 1", file=LOAD_REPORT_NAME)
    return LoadReport.of(document["class"], *(name or [] for name in names))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _listed(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    groups = (("missing", sorted(missing)), ("not in the model", sorted(unexpected)))
    return "; ".join(f"{title}: {_shortened(names)}" for title, names in groups if names)


def _shortened(names: list[str]) -> str:
    first_names = ", ".join(names[:NAMES_SHOWN])
    rest = len(names) - NAMES_SHOWN
    return f"{first_names} and {rest} more" if rest > 0 else first_names
