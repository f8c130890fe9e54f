"""`chunk_size` changes the chunks of a container and never a weight."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.converter import ConvertOptions, ParamsChoice, convert, estimate
from codecllm.converter.plan.params import QuantParams
from codecllm.formats.container import Container
from codecllm.formats.errors import UsageError
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.stored_tensor import StoredTensor
from tests.sources import bf16, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(2)
    tensors = {
        "w": ("BF16", bf16(rng.standard_normal((600, 512)))),
        "long": ("F32", rng.standard_normal((2, 70_001)).astype(np.float32)),
        "kept": ("BF16", bf16(rng.standard_normal((300, 300)))),
    }
    tensors["kept"][1][5, 5] = 0x7FC0  # NaN: int8 cannot hold it
    return write_source(
        tmp_path_factory.mktemp("source") / "model", tensors, {"model_type": "llama"}
    )


def _bits(folder):
    with Container(folder) as container:
        return {name: read_tensor_bytes(container, name) for name in container.records}


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("chunk_kib", [4, 64, 1024])
def test_chunks_have_the_size_asked_for_and_the_same_weights(tmp_path, source, chunk_kib, codec):
    options = {"codec": codec, "non_finite": "lossless"}
    default = convert(source, tmp_path / "default", **options).out
    out = convert(source, tmp_path / "out", chunk_kib=chunk_kib, workers=1, **options).out
    again = convert(source, tmp_path / "again", chunk_kib=chunk_kib, workers=3, **options).out
    assert _bits(out) == _bits(default)
    assert (out / "codecllm.json").read_bytes() == (again / "codecllm.json").read_bytes()
    with Container(out) as container:
        for name in ("w", "long", "kept"):
            stored = container.tensor(name)
            assert isinstance(stored, StoredTensor)
            grid, most = stored.table.grid, chunk_kib << 10
            tile = min(grid.tile_rows, grid.rows) * grid.tile_cols
            assert tile <= most
            assert tile > most - 2 * max(grid.tile_cols, 2) or tile == grid.rows * grid.cols
        assert container.records["kept"].scheme == "lossless"


def test_tiles_of_like_columns_follow_too(tmp_path, source):
    columns = np.linspace(0.5, 2, 512).astype(np.float32)

    def steps(plan):
        rows = np.full(plan.matrix[0], 0.05, np.float32)
        return QuantParams(rows, columns) if plan.source.name == "w" else None

    out = convert(
        source, tmp_path / "out", chunk_kib=16, non_finite="lossless", choice=ParamsChoice(steps)
    ).out
    with Container(out) as container:
        grid = container.tensor("w").table.grid
        assert grid.across > 1
        assert grid.tile_rows * grid.tile_cols <= 16 << 10


def test_a_size_out_of_range_is_refused(tmp_path, source):
    for chunk_kib in (0, 3, 1025):
        with pytest.raises(UsageError, match="not a value of chunk_kib"):
            convert(source, tmp_path / "out", chunk_kib=chunk_kib)
        with pytest.raises(UsageError, match="not a value of chunk_kib"):
            estimate(source, ConvertOptions(chunk_kib=chunk_kib))
    assert not (tmp_path / "out").exists()
