"""The native core encodes to numpy's bytes: codes, errors, planes and whole containers."""

from __future__ import annotations

import os

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.encode.packing import pack_chunks
from codecllm.converter.encode.planes import split_tiles
from codecllm.converter.encode.quantize import quantize_block, quantize_stored_rows, row_absmax
from codecllm.converter.source.tensors import SourceTensor
from codecllm.formats.codecs import native
from codecllm.formats.codecs.entropy import entropies_by_counts
from codecllm.formats.codecs.rans_fit import LOG2
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import TruncatedError
from codecllm.formats.files import SafeFile
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.schemes.int8 import channel_scales
from codecllm.formats.schemes.lossless import split_planes
from codecllm.formats.shards.safetensors_header import TensorEntry
from tests.sources import bf16, write_source

pytestmark = pytest.mark.skipif(native.core is None, reason=f"native core: {native.describe()}")
_NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}
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


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 9000)])
def test_rows_in_one_call(monkeypatch, kernels, tmp_path, shape, dtype):
    """Rows are read in one piece, in pieces of some rows, and in pieces of one."""
    for seed in range(3):
        words = _words(shape, dtype, seed)

        def work(words=words, pieces=(1, 3, 2000)):
            source = _stored(tmp_path, words, dtype)
            codes = np.empty(words.shape, np.int8)
            memory = np.empty(words.nbytes // shape[0] * max(1, shape[0] // pieces[0]), np.uint8)
            absmax, worst, problem = quantize_stored_rows(source, 0, codes, memory)
            source.file.close()
            return problem or (absmax.tobytes(), worst, codes.tobytes())

        for pieces in (1, 3, 2000):
            fast, plain = _both(monkeypatch, lambda p=pieces: work(pieces=(p,)))
            assert fast == plain and not isinstance(fast, str)
        words[-1] = 0
        words[-1, shape[1] // 2] = 1
        if dtype != "F16":  # none of its scales is subnormal
            assert _both(monkeypatch, work) == ("tiny_scale", "tiny_scale")
        # A fault that is graver, behind the other one.
        words[0, 0] = 1
        words[-1, -1] = _NAN[dtype]
        assert _both(monkeypatch, work) == ("non_finite", "non_finite")


def _stored(folder, words, dtype):
    (folder / "words").write_bytes(b"head" + words.tobytes())
    entry = TensorEntry("w", DTYPES[dtype], words.shape, 4, 4 + words.nbytes)
    return SourceTensor(entry, SafeFile(folder, "words"))


def test_rows_that_are_not_there_are_an_error(monkeypatch, tmp_path):
    source = _stored(tmp_path, np.zeros((9, 16), np.uint16), "BF16")
    codes, memory = np.empty((9, 16), np.int8), np.empty(64, np.uint8)
    os.truncate(tmp_path / "words", 4 + 8 * 32 + 31)
    with pytest.raises(TruncatedError, match="file ends early"):
        quantize_stored_rows(source, 0, codes, memory)
    source.file.close()
    quantize = native.core.quantize_rows
    for arguments in (
        (0, -1, 0, np.empty(9, np.float32), codes, memory),
        (0, 0, 3, np.empty(9, np.float32), codes, memory),
        (0, 0, -1, np.empty(9, np.float32), codes, memory),
        (0, 0, 0, np.empty(7, np.float32), codes, memory),
        (0, 0, 0, np.empty(0, np.float32), codes, memory),
        (0, 0, 0, np.empty(9, np.float32), codes[:0], memory),
        (0, 0, 0, np.empty(9, np.float32), codes, memory[:31]),
        (0, 0, 2, np.empty(9, np.float32), codes, memory[:63]),
        (0, (1 << 63) - 200, 0, np.empty(9, np.float32), codes, memory),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            quantize(*arguments)


@pytest.mark.parametrize("codec", ["zstd", "rans"])
@pytest.mark.parametrize(("places", "group"), [(1, 1), (1, 5), (2, 2), (2, 4), (3, None)])
@pytest.mark.parametrize("wide", [False, True])
def test_packing(monkeypatch, kernels, codec, places, group, wide):
    """Chunks that shrink, that do not, that are constant, and those of one symbol."""
    rng = np.random.default_rng(places)
    kinds = [
        lambda n: rng.normal(0, 9, n).astype(np.int8).view(np.uint8),
        lambda n: rng.integers(0, 256, n).astype(np.uint8),
        lambda n: np.full(n, 7, np.uint8),
        lambda n: (rng.random(n) < 0.002).astype(np.uint8),
    ]
    for sizes in ([1] * 6, [20_000, 131_072, 5, 16, 16_384, 16_385], [40_000] * 12):
        parts = [kinds[(chunk * 5) % 4](size) for chunk, size in enumerate(sizes)]
        low_bits = [3 + tile % 6 for tile in range(len(sizes) // 2)] if wide else []

        def work(parts=parts, sizes=sizes, low_bits=low_bits):
            packed = pack_chunks(
                np.concatenate(parts), sizes, codec, places=places, group=group, low_bits=low_bits
            )
            entropies = entropies_by_counts(packed.counts, packed.raw_bytes)
            slots, records = packed.slots.tobytes(), packed.records.tobytes()
            return slots, records, packed.counts.tolist(), packed.tables, entropies.tolist()

        fast, plain = _both(monkeypatch, work)
        assert fast == plain


def test_sizes_that_do_not_fit_are_refused():
    symbols, log2_table = np.zeros(40, np.uint8), LOG2
    for sizes, places, codec, room, scratch in (
        ([40], 1, 1, 47, 300),  # slots: 48 bytes
        ([39], 1, 1, 48, 300),
        ([41], 1, 1, 48, 300),
        ([40, 0], 1, 1, 64, 300),
        ([-1, 41], 1, 1, 64, 300),
        ([20, 20], 3, 1, 64, 300),
        ([20, 20], 0, 1, 64, 300),
        ([10, 10, 20], 2, 1, 64, 300),
        ([], 1, 1, 64, 300),
        ([40], 1, 3, 48, 300),
        ([40], 1, 2, 48, 128 + 79),
    ):
        out = np.empty(room, np.uint8), np.empty(16 * len(sizes), np.uint8)
        counts = np.empty(256 * len(sizes), np.uint32)
        with pytest.raises(ValueError, match="do not fit"):
            native.core.pack_chunks(
                symbols,
                np.array(sizes, np.int64),
                (places, max(2, len(sizes))),
                codec,
                None,
                [None] * len(sizes),
                log2_table,
                (*out, counts),
                np.empty(scratch, np.uint8),
            )


def test_buffers_of_wrong_types_are_refused():
    symbols, sizes = np.zeros(40, np.uint8), np.array([40], np.int64)
    out = np.empty(48, np.uint8), np.empty(16, np.uint8), np.empty(256, np.uint32)
    pack, one, wrong = native.core.pack_chunks, (1, 1), (out[0], out[1], out[1])
    assert pack(symbols, sizes, one, 1, None, [None], None, out, None) == (48, [])
    for arguments, error in (
        ((symbols, sizes, one, 1, None, [], None, out, None), ValueError),
        ((symbols, sizes, (1, 0), 1, None, [None], None, out, None), ValueError),
        ((symbols, sizes, (2, 3), 1, None, [None], None, out, None), ValueError),
        ((symbols, sizes, one, 1, None, (None,), None, out, None), ValueError),
        ((symbols, sizes, one, 1, None, ["text"], None, out, None), TypeError),
        ((symbols, sizes, one, 1, b"\0\0", [None], None, out, None), ValueError),
        ((symbols, sizes, one, 2, None, None, None, out, symbols), ValueError),
        ((symbols, sizes, one, 2, None, None, LOG2[:-1], out, symbols), ValueError),
        (
            (symbols, sizes, one, 1, None, [None], None, wrong, None),
            ValueError,
        ),
        ((symbols, sizes, one, 1, None, [None], None, (None, out[1], out[2]), None), ValueError),
        ((symbols, sizes, one, 1, None, [None], None, (b"", out[1], out[2]), None), BufferError),
    ):
        with pytest.raises(error):
            pack(*arguments)


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.planes])
def test_planes(monkeypatch, kernels, name):
    dtype = DTYPES[name]
    for count, tile in ((0, 4), (1, 1), (15, 15), (4097, 1000), (4000, 1000)):
        data = np.random.default_rng(count).bytes(count * dtype.itemsize)
        elements = np.frombuffer(data, f"<u{dtype.itemsize}")

        def work(elements=elements, tile=tile):
            symbols = np.empty(elements.nbytes, np.uint8)
            return split_tiles(elements, dtype, tile, symbols).tobytes()

        fast, plain = _both(monkeypatch, work)
        assert fast == plain
        parts = [elements[begin : begin + tile] for begin in range(0, count, tile)]
        assert plain == b"".join(
            plane.tobytes() for part in parts for plane in split_planes(part, dtype)
        )


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
