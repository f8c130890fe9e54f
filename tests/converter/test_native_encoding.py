"""The native core encodes to numpy's bytes: codes, errors, planes and whole containers."""

from __future__ import annotations

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.encode.planes import split_planes
from codecllm.converter.encode.quantize import quantize_block, row_absmax
from codecllm.formats.codecs import native
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.schemes.int8 import channel_scales
from tests.sources import bf16, write_source

pytestmark = pytest.mark.skipif(native.core is None, reason=f"native core: {native.describe()}")
SHAPES = [(1, 1), (1, 33), (7, 1), (5, 130), (64, 64), (3, 1000)]


@pytest.fixture(params=native.core.kernels() if native.core is not None else ["none"])
def kernels(request):
    before = native.core.in_use()
    native.core.use(request.param)
    yield request.param
    native.core.use(before)


def _both(monkeypatch, work):
    """Returns the results of `work` with the core and without."""
    fast = work()
    with monkeypatch.context() as patch:
        patch.setattr(native, "core", None)
        return fast, work()


def _words(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * np.exp(3 * rng.standard_normal((shape[0], 1)))
    # Quotients at ties, and channels of zeros.
    values.reshape(-1)[::3] = np.round(values.reshape(-1)[::3] * 2) / 2
    values[:: max(2, shape[0] // 3)] *= rng.integers(0, 2)
    return bits_from_float32(values.astype(np.float32), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_column", [False, True])
def test_codes_and_errors(monkeypatch, kernels, shape, dtype, by_column):
    for seed in range(5):
        words = _words(shape, dtype, seed)

        def work(words=words):
            rows = row_absmax(words, dtype)
            scales = channel_scales(rows.absmax)[:, None]
            if by_column:
                columns = row_absmax(np.ascontiguousarray(words.T), dtype)
                scales = channel_scales(columns.absmax)[None, :]
            codes = np.empty(words.shape, np.int8)
            worst = quantize_block(words, dtype, scales, codes)
            return rows.absmax.tobytes(), rows.finite, worst, codes.tobytes()

        fast, plain = _both(monkeypatch, work)
        assert fast == plain


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.planes])
def test_planes(monkeypatch, kernels, name):
    dtype = DTYPES[name]
    for count in (0, 1, 15, 4097):
        data = np.random.default_rng(count).bytes(count * dtype.itemsize)
        elements = np.frombuffer(data, f"<u{dtype.itemsize}")
        fast, plain = _both(
            monkeypatch,
            lambda elements=elements: [p.tobytes() for p in split_planes(elements, dtype)],
        )
        assert fast == plain


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_whole_containers(monkeypatch, tmp_path, scheme, codec):
    rng = np.random.default_rng(4)
    tensors = {
        "layers.0.weight": ("BF16", bf16(rng.standard_normal((700, 300)))),
        "layers.1.weight": ("F32", rng.standard_normal((300, 301)).astype(np.float32)),
        "layers.2.weight": ("F16", rng.standard_normal((256, 256)).astype(np.float16)),
        "h.0.attn.c_attn.weight": ("BF16", bf16(rng.standard_normal((300, 200)))),
        "counts": ("U8", rng.integers(0, 9, (90, 91)).astype(np.uint8)),
    }
    source = write_source(tmp_path / "source", tensors, {"model_type": "gpt2"})
    names = iter(("fast", "plain"))

    def work():
        out = convert(source, tmp_path / next(names), scheme=scheme, codec=codec).out
        return {path.name: path.read_bytes() for path in out.iterdir()}

    fast, plain = _both(monkeypatch, work)
    assert fast == plain
