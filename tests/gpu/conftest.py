"""Tests that need a real device: `make test-gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from codecllm.converter import convert
from codecllm.formats.errors import UnsupportedEnvironmentError
from codecllm.loader.device.codecs import DeviceCodecs, find_codecs
from codecllm.loader.device.nvcomp import open_nvcomp
from tests.integration.conftest import container, tiny
from tests.sources import bf16, write_source

__all__ = ["container", "tiny"]


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The device."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def codecs(gpu: torch.device) -> DeviceCodecs:
    """The decoders of this machine."""
    return find_codecs(gpu)


@pytest.fixture(scope="session")
def nvcomp(gpu: torch.device) -> None:
    """Skips where nvCOMP does not work."""
    try:
        open_nvcomp(gpu)
    except UnsupportedEnvironmentError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Containers by scheme and codec: 180 MB of weights, several batches, odd shapes, long rows."""
    rng = np.random.default_rng(3)
    tensors = {
        f"layers.{n}.weight": ("BF16", bf16(0.02 * rng.standard_normal((4096, 4096))))
        for n in range(4)
    }
    tensors |= {
        "odd": ("BF16", bf16(rng.standard_normal((1001, 777)))),
        "half": ("F16", rng.standard_normal((999, 1003)).astype(np.float16)),
        "single": ("F32", (rng.standard_normal((2000, 1024)) ** 3).astype(np.float32)),
        "double": ("F64", rng.standard_normal((300, 300))),
        "mask": ("BOOL", rng.integers(0, 2, (512, 300)).astype(np.uint8)),
        "long": ("F32", rng.standard_normal((3, 400_001)).astype(np.float32)),
        "h.0.attn.c_attn.weight": ("F32", rng.standard_normal((768, 2304)).astype(np.float32)),
        "noise": ("U8", rng.integers(0, 256, (3000, 3000)).astype(np.uint8)),
        "norm": ("F32", np.ones(4096, np.float32)),
        "none": ("F32", np.ones((0, 4), np.float32)),
    }
    base = tmp_path_factory.mktemp("large")
    source = write_source(
        base / "source", tensors, {"model_type": "gpt2", "architectures": ["GPT2Model"]}
    )
    made: dict[tuple[str, str], Path] = {}

    def get(scheme: str, codec: str) -> Path:
        if (scheme, codec) not in made:
            made[scheme, codec] = base / f"{scheme}-{codec}"
            convert(source, made[scheme, codec], scheme=scheme, codec=codec)
        return made[scheme, codec]

    return get
