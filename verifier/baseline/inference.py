"""Runs of a model that two runs can be compared by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SEED = 0


@contextmanager
def repeatable_inference(model: Any) -> Iterator[None]:
    """Turns gradients off, and gives the random numbers that a model draws a fixed beginning.

    Some classes draw them in `eval()` too: VITS has random durations. torch's own generators are
    as before when the block ends.

    Args:
        model: of transformers.
    """
    device = torch.device(model.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.default_generator.manual_seed(_SEED)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_SEED)
        yield
