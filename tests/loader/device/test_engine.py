"""Every way onto a device gives the bits of the reference; `machine` plays the device."""

from __future__ import annotations

import signal
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
import zstandard

from codecllm.converter import ParamsChoice, convert
from codecllm.converter.plan.params import QuantParams
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, DecodeError
from codecllm.formats.reference import read_codes, read_tensor_bytes
from codecllm.formats.shards.chunk_table import RECORD
from codecllm.loader.device import issuing, plan, reading
from codecllm.loader.device.chunks import ChunkList, ChunkWork
from codecllm.loader.device.codecs import NOTHING, DeviceTools
from codecllm.loader.device.engine import DeviceEngine
from codecllm.loader.engine import Request
from codecllm.loader.reader import TensorReader
from codecllm.loader.torch_tensors import file_order, torch_dtype
from tests import tampering
from tests.loader.device.host_streams import HostStreams
from tests.loader.device.machine import KERNELS_ONLY, NvcompOfTheHost, engine_of, with_nvcomp
from tests.malformed.builders import fix_chunks, make_container, rewrite_shard, split_shard
from tests.sources import bf16, write_source

COLUMNS = "h.0.attn.c_attn.weight"


def _bytes(tensor):
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Odd shapes, all schemes, dtypes with and without kernels, a plain and an empty tensor."""
    rng = np.random.default_rng(5)
    tensors = {
        "wide": ("BF16", bf16(rng.standard_normal((3, 1000)))),
        "tall": ("F16", rng.standard_normal((333, 7)).astype(np.float16)),
        "full": ("F32", (rng.standard_normal((45, 50)) ** 3).astype(np.float32)),
        "fine": ("F64", rng.standard_normal((20, 30))),
        "mask": ("BOOL", rng.integers(0, 2, (64, 40)).astype(np.uint8)),
        "ids": ("I64", np.arange(600).reshape(20, 30)),
        COLUMNS: ("F32", rng.standard_normal((40, 48)).astype(np.float32)),
        "noise": ("U8", rng.integers(0, 256, (300, 30)).astype(np.uint8)),
        "norm": ("F32", np.ones(63, np.float32)),
        "none": ("F32", np.ones((0, 4), np.float32)),
    }
    config = {"model_type": "gpt2", "architectures": ["GPT2Model"]}
    return write_source(tmp_path_factory.mktemp("device") / "source", tensors, config)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    base, folders = tmp_path_factory.mktemp("made"), {}
    for scheme in ("int8", "lossless"):
        folders[scheme] = base / scheme
        convert(source, folders[scheme], scheme=scheme, include=("*",) if scheme == "int8" else ())
    return folders


@pytest.fixture(scope="module")
def rans_container(tmp_path_factory):
    """Small: an interpreted step takes milliseconds. `l` is lossless, `q` int8, `n` plain."""
    rng = np.random.default_rng(1)
    tensors = {
        "l": ("BF16", bf16(rng.standard_normal((20, 64)))),
        "q": ("F32", (rng.standard_normal((16, 65)) ** 3).astype(np.float32)),
        "n": ("F32", np.linspace(0, 1, 9, dtype=np.float32)),
    }
    base = tmp_path_factory.mktemp("rans")
    source = write_source(base / "source", tensors, {"model_type": "none"})
    convert(source, base / "container", codec="rans", include=("*",), exclude=("l",))
    return base / "container"


def _take(engine, name, part="weight", dtype=None):
    return engine.take(Request(name, part, dtype)).get()


def _take_all(folder, codecs):
    """Takes every tensor as its own dtype, decoded ahead, and compares it with the reference."""
    with engine_of(folder, codecs) as (container, engine):
        names = list(file_order(container))
        requests = {
            name: Request(name, dtype=torch_dtype(container.records[name].dtype)) for name in names
        }
        engine.prefetch(requests.values())
        for name in reversed(names):
            tensor = engine.take(requests[name]).get()
            assert list(tensor.shape) == container.records[name].shape
            assert _bytes(tensor) == read_tensor_bytes(container, name), name


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_zstd_through_nvcomp_has_the_bits_of_the_reference(made, scheme):
    nvcomp = NvcompOfTheHost()
    _take_all(made[scheme], with_nvcomp(nvcomp))
    assert nvcomp.frames > 2


def test_rans_through_the_kernel_has_the_bits_of_the_reference(rans_container):
    _take_all(rans_container, KERNELS_ONLY)


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
@pytest.mark.parametrize("codecs", [NOTHING, KERNELS_ONLY], ids=["no kernels", "no nvcomp"])
def test_what_the_device_cannot_decode_is_decoded_on_the_cpu(made, scheme, codecs):
    _take_all(made[scheme], codecs)


def test_small_batches_and_pieces_fit_together(made, monkeypatch):
    """Every tensor spans batches, the ring and the stages go round several times."""
    monkeypatch.setattr(plan, "PIECE_SYMBOLS", 700)
    for module in (plan, reading, issuing):
        monkeypatch.setattr(module, "SLOT_BYTES", 4096)
    for module in (plan, issuing):
        monkeypatch.setattr(module, "ARENA_BYTES", 2048)
    for scheme in ("int8", "lossless"):
        _take_all(made[scheme], with_nvcomp(NvcompOfTheHost()))
        _take_all(made[scheme], NOTHING)


def test_other_dtypes_are_those_of_the_cpu_path(made):
    for scheme in ("int8", "lossless"):
        folder = made[scheme]
        with (
            engine_of(folder, with_nvcomp(NvcompOfTheHost())) as (container, engine),
            closing(TensorReader(container, 1)) as reader,
        ):
            for name in ("wide", "tall", "full", COLUMNS, "norm"):
                for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
                    assert torch.equal(
                        _take(engine, name, "weight", dtype), reader.read(name, "weight", dtype)
                    ), (name, dtype)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("codecs", [NOTHING, with_nvcomp(NvcompOfTheHost())], ids=["cpu", "nvcomp"])
def test_scales_and_groups_of_columns_and_wide_codes(tmp_path, codecs, wide):
    rng = np.random.default_rng(7)
    values = (rng.standard_normal((300, 200)) * np.geomspace(0.01, 1, 200)).astype(np.float32)
    source = write_source(
        tmp_path / "source",
        {"w": ("F32", values), "v": ("BF16", bf16(values))},
        {"model_type": "none"},
    )
    columns, groups = (
        np.geomspace(0.5, 2, 200).astype(np.float32),
        rng.integers(0, 9, 200).astype(np.uint8),
    )
    rows = np.abs(values / columns).max(axis=1).astype(np.float32) / (3000 if wide else 110)
    steps = QuantParams(rows, columns, groups, tile=(64, 50), wide=wide)
    folder = convert(
        source,
        tmp_path / "out",
        scheme="int8",
        include=("*",),
        choice=ParamsChoice(lambda plan: steps),
    ).out
    with Container(folder) as container:
        assert container.tensor("w").wide is wide
    _take_all(folder, codecs)
    with engine_of(folder, codecs) as (container, engine):
        codes = read_codes(container.tensor("w"))
        assert codes.dtype == (np.int16 if wide else np.int8)
        assert torch.equal(_take(engine, "w", "codes", None), torch.from_numpy(codes.copy()))


def test_codes_and_payloads(made):
    for codecs in (with_nvcomp(NvcompOfTheHost()), NOTHING):
        with engine_of(made["int8"], codecs) as (container, engine):
            stored = container.tensor("tall")
            assert torch.equal(
                _take(engine, "tall", "codes", None), torch.from_numpy(read_codes(stored).copy())
            )
            payload = bytearray(stored.slots_bytes(0, len(stored.table.chunks)))
            stored.file.read_into(stored.offset, memoryview(payload))
            assert _bytes(_take(engine, "tall", "payload", None)) == payload


def test_many_threads_ask_at_once(made):
    folder, wrong = made["lossless"], []
    with engine_of(folder, with_nvcomp(NvcompOfTheHost())) as (container, engine):

        def ask(name):
            tensor = _take(engine, name, "weight", torch_dtype(container.records[name].dtype))
            if _bytes(tensor) != read_tensor_bytes(container, name):
                wrong.append(name)

        threads = [
            threading.Thread(target=ask, args=(name,)) for name in list(container.records) * 3
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("codecs", [NOTHING, with_nvcomp(NvcompOfTheHost())], ids=["cpu", "nvcomp"])
def test_a_flipped_bit_is_named_before_anything_is_decoded(tmp_path, codecs):
    folder = make_container(tmp_path)
    path, byte = tampering.payload_place(folder, "l", 1)
    tampering.flip_bit(path, byte + 3)
    with engine_of(folder, codecs) as (_, engine):
        with pytest.raises(ChecksumError, match="'l' chunk 1"):
            _take(engine, "l", "weight", torch.bfloat16)
        with pytest.raises(ChecksumError, match="'l' chunk 1"):  # the first error stays
            _take(engine, "q", "weight", torch.bfloat16)


def test_a_flipped_bit_of_a_plain_tensor_is_named(tmp_path):
    folder = make_container(tmp_path)
    with Container(folder) as container:
        plain = container.tensor("n")
        path, byte = folder / plain.file.name, plain.offset
    tampering.flip_bit(path, byte + 3)
    with engine_of(folder) as (_, engine), pytest.raises(ChecksumError, match="tensor 'n'"):
        _take(engine, "n", "weight", torch.float32)


def test_what_nvcomp_reports_names_the_chunk(tmp_path):
    folder = make_container(tmp_path)
    for nvcomp, message in (
        (NvcompOfTheHost(status=12), r"'l' chunk 0 at byte \d+: nvCOMP status 12: made up"),
        (
            NvcompOfTheHost(decoded_bytes=5),
            r"'l' chunk 0 at byte \d+: frame decodes to a wrong size, got 5",
        ),
    ):
        with (
            engine_of(folder, with_nvcomp(nvcomp)) as (_, engine),
            pytest.raises(DecodeError, match=message),
        ):
            _take(engine, "l", "weight", torch.bfloat16)


def test_a_frame_of_another_size_never_reaches_nvcomp(tmp_path):
    folder, nvcomp = make_container(tmp_path), NvcompOfTheHost()

    def edit(tensors):
        payload, size = (
            tensors["l"][2],
            int(np.frombuffer(tensors["l_chunks"][2], RECORD, 1, 32)["stored_bytes"][0]),
        )
        frame = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 20))
        assert len(frame) <= size
        payload[: len(frame)] = frame
        fix_chunks(tensors, "l")

    rewrite_shard(folder, edit)
    message = r"'l' chunk 0 at byte \d+: frame declares a wrong size, got 1048576"
    with (
        engine_of(folder, with_nvcomp(nvcomp)) as (_, engine),
        pytest.raises(DecodeError, match=message),
    ):
        _take(engine, "l", "weight", torch.bfloat16)
    assert nvcomp.frames == 0


def test_a_forbidden_code_is_found_on_the_device(tmp_path):
    folder = make_container(tmp_path)

    def edit(tensors):
        payload = tensors["q"][2]
        records = np.frombuffer(tensors["q_chunks"][2], RECORD, offset=32).copy()
        symbols = bytearray(zstandard.decompress(bytes(payload[: records["stored_bytes"][0]])))
        symbols[1234] = 0x80
        frame = zstandard.ZstdCompressor(level=19).compress(bytes(symbols))
        records["stored_bytes"][0] = len(frame)
        tensors["q_chunks"][2][32:] = records.tobytes()
        payload[:] = frame.ljust(-(-len(frame) // 16) * 16, b"\0")
        fix_chunks(tensors, "q")

    rewrite_shard(folder, edit)
    stored = _sizes(folder)
    tampering.reseal(folder, lambda document: _set_stored(document, stored))
    message = r"'q' chunk 0 at byte \d+: code -128 is not allowed"
    with (
        engine_of(folder, with_nvcomp(NvcompOfTheHost())) as (_, engine),
        pytest.raises(DecodeError, match=message),
    ):
        _take(engine, "q", "weight", torch.bfloat16)


def test_corrupt_rans_words_end_in_an_error_that_names_the_chunk(rans_container, tmp_path):
    folder = tampering.copy_of(rans_container, tmp_path / "container")

    def edit(tensors):
        tensors["q"][2][200] ^= 1
        fix_chunks(tensors, "q")

    rewrite_shard(folder, edit)
    with (
        engine_of(folder, KERNELS_ONLY) as (_, engine),
        pytest.raises(DecodeError, match=r"'q' chunk 0 at byte .*rans chunk"),
    ):
        _take(engine, "q", "weight", torch.float32)


def _sizes(folder):
    """The stored bytes of `q`'s only chunk, as its chunk table has them."""
    tensors, _ = split_shard(folder)
    return int(np.frombuffer(tensors["q_chunks"][2], RECORD, offset=32)["stored_bytes"][0])


def _set_stored(document, stored):
    record = next(record for record in document["tensors"] if record["name"] == "q")
    record["planes"][0]["stored_bytes"] = stored


def test_a_closed_engine_answers_at_once(made):
    with engine_of(made["lossless"]) as (_, engine):
        pass
    with pytest.raises(RuntimeError, match="closed"):
        _take(engine, "wide", "weight", torch.bfloat16)


class _Broken(HostStreams):
    """A device that fails once, and then at every call."""

    def record(self, stream):
        raise RuntimeError("an illegal memory access was encountered")

    def synchronize(self):
        self.record(None)


def test_a_broken_device_lets_no_thread_wait(made):
    with Container(made["lossless"]) as container:
        engine = DeviceEngine(container, 2, _Broken(), NOTHING)
        engine.prefetch([Request("wide"), Request("tall")])
        answers = []

        def take(name):
            with pytest.raises(RuntimeError, match="illegal memory access"):
                _take(engine, name)
            answers.append(name)

        threads = [
            threading.Thread(target=take, args=(name,), daemon=True)
            for name in ("wide", "tall", "full")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(answers) == ["full", "tall", "wide"]
        engine.close()


def test_closing_may_be_interrupted_and_done_again(made, monkeypatch, ctrl_c):
    with Container(made["lossless"]) as container:
        engine = DeviceEngine(container, 2, HostStreams(), NOTHING)
        engine.prefetch([Request("wide")])
        with monkeypatch.context() as patch:
            patch.setattr(engine._ended, "wait", lambda *_: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                engine.close()
        engine.close()
        assert engine._ended.done


def test_tables_reach_the_device_even_where_new_tensors_go_to_meta(rans_container):
    with Container(rans_container) as container:
        source, chunks = container.tensor("q"), ChunkList()
        chunks.add(source, range(source.table.grid.down), 0, [0])
        with torch.device(
            "meta"
        ):  # as transformers has it while it lets a quantizer prepare a model
            expanded = DeviceTools(HostStreams(), KERNELS_ONLY).expand(
                ChunkWork(chunks, 0, 0).tables
            )
    assert expanded is not None
    assert not any(
        part.is_meta for part in (expanded[0].symbols, expanded[0].ranges, expanded[0].precisions)
    )
