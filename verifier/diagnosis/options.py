"""Options of a diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from codecllm.verifier.diagnosis.codes.back_ends import BackEnd

Resident = Literal["dense", "int8", "compressed"]
# Spelled here too: importing the loader for its names would import torch.
RESIDENTS: tuple[Resident, ...] = ("dense", "int8", "compressed")


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
