"""Options of a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from codecllm.formats.arguments.check import (
    Check,
    check_fields,
    choice,
    function,
    instance,
    integer,
    optional,
    sequence,
    text,
)

if TYPE_CHECKING:
    from codecllm.verifier.diagnosis.codes.back_ends import BackEnd

Resident = Literal["dense", "int8", "compressed"]
# Spelled here too: importing the loader for its names would import torch.
RESIDENTS: tuple[Resident, ...] = ("dense", "int8", "compressed")


_CHECKS: dict[str, Check] = {
    "resident": choice(RESIDENTS),
    "first_layers": optional(integer(0)),
    "prompts": optional(sequence(text)),
    "load": optional(function),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseOptions:
    """Options of a diagnosis.

    Attributes:
        resident: how the loaded model keeps its weights while it runs; the weights of every
            residency are compared.
        first_layers: run text with only the first so many layers from the container and the others
            from the source.
        prompts: texts that both models continue; None takes the fixed prompts of the baseline.
        text: text for the perplexity; None takes the built-in one.
        workers: threads; None takes one per core.
        expected_manifest_sha256: accept no other manifest.
        revision: branch, tag or commit of a Hub id.
        load: loads the container, as `codecllm.loader.from_pretrained` (the default) does; called
            with the folder and `resident`. Give your own to find its faults.
        back_ends: decode back ends to compare; None takes those of this machine.

    Raises:
        UsageError: a field is of a wrong type or out of range.
    """

    resident: Resident = "dense"
    first_layers: int | None = None
    prompts: Sequence[str] | None = None
    text: str | None = None
    workers: int | None = None
    expected_manifest_sha256: str | None = None
    revision: str | None = None
    load: Callable[..., Any] | None = None
    back_ends: Sequence[BackEnd] | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        check_fields(self, _CHECKS, "text", "workers", "expected_manifest_sha256", "revision")
        if self.back_ends is not None:
            # Imported late: it imports torch.
            from codecllm.verifier.diagnosis.codes.back_ends import BackEnd

            sequence(instance(BackEnd))(self.back_ends, "back_ends")
