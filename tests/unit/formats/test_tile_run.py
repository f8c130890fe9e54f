"""Runs of tiles: the native core and numpy give the bits of the slow reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.plan.choice import ParamsChoice
from codecllm.formats.codecs import native
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import ChecksumError
from codecllm.formats.manifest.records import Int8Tensor
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.formats.tile_run import CODES, WIDE_CODES, decode_natively, decode_plainly, decode_run
from tests.sources import bf16, write_source
from tests.stepped import make_steps

GOLDEN = sorted(
    path.parent for path in (Path(__file__).parents[2] / "golden").glob("*/*/codecllm.json")
)
KERNELS = native.core.kernels() if native.core is not None else ()


@pytest.fixture(params=["numpy", *KERNELS])
def decode(request):
    """Decodes by numpy, or by the native core with one set of its kernels."""
    if request.param == "numpy":
        yield decode_plainly
        return
    before = native.core.in_use()
    native.core.use(request.param)
    yield _decode_natively
    native.core.use(before)


def _decode_natively(*arguments):
    assert decode_natively(*arguments)


def _tensors(folder):
    with Container(folder) as container:
        for name in container.records:
            tensor = container.tensor(name)
            if isinstance(tensor, StoredTensor) and len(tensor.table.grid):
                yield container, name, tensor


def _decoded(tensor, target, decode, tiles_of_run):
    itemsize = {CODES: 1, WIDE_CODES: 2}.get(target) or DTYPES[target].itemsize
    grid = tensor.table.grid
    out = np.zeros((grid.rows, grid.cols), f"<u{itemsize}")
    step = max(1, tiles_of_run // tensor.tiles_together) * tensor.tiles_together
    for first in range(0, len(grid), step):
        tiles = range(first, min(first + step, len(grid)))
        decode(tensor, tiles, out, target, _slots(tensor, tiles))
    return out.tobytes()


def _slots(tensor, tiles):
    first, last = tiles.start * tensor.table.planes, tiles.stop * tensor.table.planes
    return tensor.read_slots(first, last, bytearray(tensor.slots_bytes(first, last)))


def _targets(tensor):
    if not isinstance(tensor.record, Int8Tensor):
        return [tensor.record.dtype]
    return ["BF16", "F16", "F32", WIDE_CODES if tensor.wide else CODES]


def _compare(folder, decode):
    """Compares whole tensors with the reference.

    Other targets, which it does not know, with numpy.
    """
    count = 0
    for container, name, tensor in _tensors(folder):
        for target in _targets(tensor):
            for tiles_of_run in (1, 3, 1 << 20):
                got = _decoded(tensor, target, decode, tiles_of_run)
                assert got == _decoded(tensor, target, decode_plainly, 1 << 20), (name, target)
            if target == tensor.record.dtype:
                assert got == bytes(read_tensor_bytes(container, name)), (name, target)
            count += 1
    return count


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_golden_containers(folder, decode):
    assert _compare(folder, decode)


SHAPES = [(1, 1), (3, 1), (1, 700), (5, 37), (64, 129), (33, 512), (300, 64)]


def _source(folder, dtype):
    rng = np.random.default_rng(5)
    tensors = {}
    for rows, cols in SHAPES:
        values = rng.standard_normal((rows, cols)) * np.exp(rng.standard_normal((rows, 1)))
        words = bf16(values) if dtype == "BF16" else values.astype(f"f{DTYPES[dtype].itemsize}")
        tensors[f"layers.{rows}x{cols}.weight"] = (dtype, words)
        tensors[f"h.0.attn.c_attn.{rows}x{cols}.weight"] = (dtype, words)
    return write_source(folder, tensors, {"model_type": "gpt2"})


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", ["lossless", "int8", "columns", "wide"])
def test_odd_shapes(tmp_path, kind, dtype, codec, decode):
    options = {
        "codec": codec,
        "chunk_kib": 4,
        "scheme": "lossless" if kind == "lossless" else "int8",
    }
    if kind != "lossless":
        options["include"] = ["*"]
    if kind == "columns":
        options["choice"] = ParamsChoice(lambda plan: make_steps(plan, 0.1, tile=(17, 40)))
    elif kind == "wide":
        options["choice"] = ParamsChoice(lambda plan: make_steps(plan, 0.008, short=True))
    out = convert(_source(tmp_path / "source", dtype), tmp_path / "out", **options).out
    assert _compare(out, decode)


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_chunks_of_all_lengths_side_by_side(tmp_path, scheme, decode):
    """Two tiles are decoded at once; the last tile of a tensor and the last group are short."""
    rng = np.random.default_rng(8)
    tensors = {
        f"{rows}.weight": ("BF16", bf16(rng.standard_normal((rows, 1024)) * rng.uniform(0.2, 5)))
        for rows in (127, 128, 129, 300, 1100, 1153, 2200)
    }
    source = write_source(tmp_path / "source", tensors, {})
    out = convert(source, tmp_path / "out", scheme=scheme, codec="rans").out
    assert _compare(out, decode)


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_a_flip_of_any_byte_is_named(tmp_path, scheme, codec):
    rng = np.random.default_rng(6)
    source = write_source(
        tmp_path / "source", {"w": ("BF16", bf16(rng.standard_normal((64, 100))))}, {}
    )
    convert(source, tmp_path / "out", scheme=scheme, codec=codec, chunk_kib=4, include=["w"])
    with Container(tmp_path / "out") as container:
        tensor = container.tensor("w")
        tiles = range(len(tensor.table.grid))
        slots = bytearray(_slots(tensor, tiles))
        out = np.zeros((64, 100), np.uint16)
        offsets = tensor.table.offsets
        for position in range(0, len(slots), 7):
            slots[position] ^= 1 << position % 8
            chunk = int(np.searchsorted(offsets, position, side="right")) - 1
            with pytest.raises(ChecksumError) as caught:
                decode_run(tensor, tiles, out, "BF16", memoryview(slots))
            assert (caught.value.tensor, caught.value.chunk) == ("w", chunk)
            slots[position] ^= 1 << position % 8
        decode_run(tensor, tiles, out, "BF16", memoryview(slots))


@pytest.mark.skipif(native.core is None, reason=f"native core: {native.describe()}")
def test_sizes_that_do_not_fit_are_refused(tmp_path):
    rng = np.random.default_rng(7)
    source = write_source(
        tmp_path / "source", {"w": ("BF16", bf16(rng.standard_normal((64, 100))))}, {}
    )
    convert(source, tmp_path / "out", chunk_kib=4, codec="rans", include=["w"])
    with Container(tmp_path / "out") as container:
        tensor = container.tensor("w")
        tiles = range(len(tensor.table.grid))
        slots = _slots(tensor, tiles)
        good = np.zeros((64, 100), np.uint16)
        for out in (good[1:], np.zeros((64, 101), np.uint16), np.zeros(1, np.uint16)):
            with pytest.raises(ValueError, match="do not fit"):
                decode_natively(tensor, tiles, out, "BF16", slots)
        for part in (slots[:-16], slots[16:], slots[:0]):
            with pytest.raises(ValueError, match="do not fit"):
                decode_natively(tensor, tiles, good, "BF16", part)
        with pytest.raises(ValueError, match="do not fit"):
            decode_natively(tensor, range(1, len(tiles) + 1), good, "BF16", slots)
        assert isinstance(tensor.record, Int8Tensor)
        with pytest.raises(ValueError, match="do not fit"):
            decode_natively(tensor, tiles, good, WIDE_CODES, slots)
        decode_run(tensor, tiles, good, "BF16", slots)
