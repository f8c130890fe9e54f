"""Tensors of many shapes and types come back: long rows, rows cut into tiles, odd ends."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.source.source import SourceModel
from codecllm.formats.container import Container
from codecllm.verifier.checks.comparison import check_source
from codecllm.verifier.report import Stage
from tests.sources import bf16, write_source

_COUNT = 40
_FLOATS = {"BF16": bf16, "F16": lambda a: a.astype(np.float16), "F32": lambda a: a.astype("<f4")}
_OTHERS = {"F64": "<f8", "I8": "i1", "U8": "u1", "I64": "<i8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Rows of up to 20,000 elements, which chunks of 4 KiB cut into tiles of one row."""
    rng = np.random.default_rng(11)
    tensors = {}
    for number in range(_COUNT):
        rows, cols = int(rng.integers(1, 60)), int(rng.integers(1, 20_000))
        if number % 3 == 0:
            rows, cols = int(rng.integers(1, 3000)), int(rng.integers(1, 300))
        values = rng.standard_normal((rows, cols)) * rng.uniform(0.5, 2, (rows, 1))
        kinds = [*_FLOATS, *_FLOATS, *_OTHERS]
        kind = kinds[number % len(kinds)]
        if kind in _FLOATS:
            tensors[f"t{number}.weight"] = kind, _FLOATS[kind](values)
        else:
            tensors[f"t{number}.weight"] = kind, (20 * values).astype(_OTHERS[kind])
    tensors["long.weight"] = "F32", rng.standard_normal((3, 400_001)).astype(np.float32)
    return write_source(tmp_path_factory.mktemp("shapes") / "source", tensors, {})


@pytest.mark.parametrize("chunk_kib", [4, 128])
@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_every_tensor_is_that_of_the_source(source, tmp_path, scheme, codec, chunk_kib):
    include = ("*",) if scheme == "int8" else ()
    out = tmp_path / "out"
    convert(source, out, scheme=scheme, codec=codec, chunk_kib=chunk_kib, include=include)
    with Container(out) as container, SourceModel(source, view=scheme) as model:
        stage = Stage("source")
        check_source(container, model, stage, 1, None)
        assert len(container.records) == _COUNT + 1
    assert stage.findings == []
