"""GGUF is refused with the true reason: Q8_0 would change scales."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.exports import gguf
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from tests import sources


def made(tmp_path, weights, scheme="int8"):
    source = sources.write_source(tmp_path / "source", {"w": ("F32", weights.astype(np.float32))})
    convert(source, tmp_path / "out", scheme=scheme, include=("*",) if scheme == "int8" else ())
    return Container(tmp_path / "out")


def test_the_reason_counts_the_scales_that_float16_would_change(tmp_path):
    weights = np.random.default_rng(0).standard_normal((40, 64))
    weights[:3] = 0
    weights[:3, 0] = 127 * 0.5  # scales that float16 holds
    with (
        made(tmp_path, weights) as container,
        pytest.raises(UsageError, match="37 of 40 would change") as caught,
    ):
        gguf.refuse(container)
    assert "float16" in str(caught.value)
    assert caught.value.exit_code == 2


def test_scales_that_would_fit_are_no_reason_to_pretend(tmp_path):
    with (
        made(tmp_path, np.full((4, 32), 127.0)) as container,
        pytest.raises(UsageError, match="writes no GGUF"),
    ):
        gguf.refuse(container)


def test_lossless_is_not_q8_0(tmp_path):
    weights = np.random.default_rng(0).standard_normal((64, 64))
    with (
        made(tmp_path, weights, "lossless") as container,
        pytest.raises(UsageError, match="Q8_0 is not lossless"),
    ):
        gguf.refuse(container)


def test_the_format_is_what_it_is_taken_for():
    """The gguf package's own Q8_0: 32 weights share a float16 scale."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    row = np.linspace(-1, 1, 32, dtype=np.float32)
    block = quants.quantize(row, GGMLQuantizationType.Q8_0)
    assert block.nbytes == 34
    scale = np.float32(1 / 127)
    assert block[:2].view(np.float16)[0] == np.float16(scale) != scale
