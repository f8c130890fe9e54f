"""Source model -> sensitivities: how much errors of each tensor change the model's output.

They are sums of gradients or activations on a short text, one pair of vectors per tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codecllm.calibrator.calibration import Calibrated as Calibrated
    from codecllm.calibrator.calibration import calibrate as calibrate

__all__ = ["Calibrated", "calibrate"]


def __getattr__(name: str) -> Any:
    """Imports a public name, and torch with it, when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("codecllm.calibrator.calibration"), name)
