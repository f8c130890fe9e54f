"""The residencies by name, and which of them a model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Resident = Literal["dense", "int8", "compressed", "packed"]
"""How weights lie in memory; see `pretrained.from_pretrained`."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The residency of a loaded model: its attribute `codecllm_resident`.

    Attributes:
        resident: its name.
        reason: one line that says why it was taken.
    """

    resident: Resident
    reason: str
