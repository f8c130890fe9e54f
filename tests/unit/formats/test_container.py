"""Whole containers: every scheme, dtype and odd shape comes back.

Reading in pieces, in threads and by pinned digest.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.formats.checksums import sha256_hex, xxh3
from codecllm.formats.codecs import ZSTD
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import (
    ChecksumError,
    DecodeError,
    FormatError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
)
from codecllm.formats.files import SafeFile
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.manifest.records import FileRecord
from codecllm.formats.reference import (
    read_codes,
    read_run_bytes,
    read_symbols,
    read_tensor_bytes,
    tensor_digest,
)
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.shards import side_reading
from codecllm.formats.stored_tensor import (
    PlainTensor,
    StoredTensor,
    scales_for_tile,
    sound,
    tensor_matrix,
)
from tests import tampering
from tests.malformed.builders import SHARD, fix_chunks, make_container, rewrite_shard
from tests.sources import bf16, write_source

SHAPES = [
    (),
    (0, 7),
    (7, 0),
    (1,),
    (1, 1),
    (5, 123),
    (1, 65_537),
    (3, 4, 5),
    (2, 1, 1, 1, 1, 1, 1, 9),
]
WHOLE = [dtype for dtype in DTYPES.values() if dtype.bits >= 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_container(tmp_path_factory.mktemp("container"))


def _elements(dtype, shape):
    count, rng = int(np.prod(shape, dtype=np.int64)), np.random.default_rng(len(shape))
    high = 2 if dtype.name == "BOOL" else 256
    return (
        rng.integers(0, high, count * dtype.itemsize, dtype=np.uint8)
        .view(f"V{dtype.itemsize}")
        .reshape(shape)
    )


@pytest.mark.parametrize("dtype", WHOLE, ids=lambda dtype: dtype.name)
def test_lossless_gives_back_the_bytes_of_every_type_and_shape(tmp_path, dtype):
    """Random bits: NaNs, infinities and subnormals of every kind among them."""
    tensors = {
        "x".join(map(str, shape)) or "scalar": (dtype.name, _elements(dtype, shape))
        for shape in SHAPES
    }
    convert(write_source(tmp_path / "source", tensors), tmp_path / "c", scheme="lossless")
    with Container(tmp_path / "c") as container:
        assert sorted(container.records) == sorted(tensors)
        for name, (_, data) in tensors.items():
            assert read_tensor_bytes(container, name) == data.tobytes(), name
            assert (
                tensor_digest(container, name)
                == container.records[name].digest
                == sha256_hex(data.tobytes())
            )
            assert tuple(container.records[name].shape) == data.shape


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern_of_16_bits_survives_a_container(tmp_path, dtype):
    """Sorted by exponent, so that the tensor shrinks and is coded."""
    words = np.repeat(np.arange(1 << 16, dtype=np.uint16), 2).reshape(512, 256)
    convert(
        write_source(tmp_path / "source", {"w": (dtype, words)}), tmp_path / "c", scheme="lossless"
    )
    with Container(tmp_path / "c") as container:
        assert container.records["w"].scheme == "lossless"
        assert read_tensor_bytes(container, "w") == words.tobytes()


def test_int8_is_its_codes_times_its_scales(folder):
    with Container(folder) as container:
        for name, shape in (("q", (24, 1)), ("h.0.attn.c_attn.weight", (1, 48))):
            tensor = container.tensor(name)
            codes = read_codes(tensor)
            assert codes.shape == tensor_matrix(tensor.record) == tuple(tensor.record.shape)
            values = codes.astype(np.float32) * tensor.scales.reshape(shape)
            assert (
                read_tensor_bytes(container, name)
                == bits_from_float32(values, tensor.record.dtype).tobytes()
            )
            digest = hashlib.sha256(
                codes.tobytes() + tensor.scales.astype("<f4").tobytes()
            ).hexdigest()
            assert tensor_digest(container, name) == tensor.record.digest == digest
            assert tensor.record.scale_range == pytest.approx(
                [tensor.scales.min(), tensor.scales.max()]
            )


def test_tiles_are_parts_of_the_tensor(tmp_path):
    """Columns cut into three tiles, by rows and by columns of channels."""
    wide = (np.random.default_rng(0).standard_normal((3, 300_001)) ** 3).astype(np.float32)
    tensors = {
        "l": ("BF16", bf16(wide)),
        "q": ("F16", wide.astype(np.float16)),
        "h.0.attn.c_attn.weight": ("F32", wide),
    }
    source = write_source(tmp_path / "source", tensors, {"model_type": "gpt2"})
    convert(source, tmp_path / "c", include=("*",), exclude=("l",))
    with Container(tmp_path / "c") as container:
        for name, (dtype, _) in tensors.items():
            tensor = container.tensor(name)
            grid = tensor.table.grid
            assert (grid.across, grid.down) == (3, 3)
            whole = np.frombuffer(
                read_tensor_bytes(container, name), f"<u{DTYPES[dtype].itemsize}"
            ).reshape(3, 300_001)
            for index in range(len(grid)):
                tile = grid.tile(index)
                part = whole[tile.row : tile.row + tile.rows, tile.col : tile.col + tile.cols]
                assert read_run_bytes(tensor, range(index, index + 1)) == part.tobytes()
                if tensor.scales is not None:
                    assert scales_for_tile(tensor.record, tensor.scales, tile).size in (
                        tile.rows,
                        tile.cols,
                    )


def test_slots_may_be_read_together_or_one_by_one(folder):
    with Container(folder) as container:
        tensor = container.tensor("l")
        assert isinstance(tensor, StoredTensor)
        count = len(tensor.table.chunks)
        assert count == 2
        slots = tensor.read_slots(0, count, bytearray(tensor.slots_bytes(0, count) + 100))
        assert len(slots) == int(tensor.table.offsets[-1]) == tensor.slots_bytes(0, count)
        together = [bytes(tensor.decode_chunk(chunk, slots, 0)) for chunk in range(count)]
        assert together == [matrix.tobytes() for matrix in read_symbols(tensor)]


@pytest.mark.parametrize("limit", [side_reading.SIDES_TOGETHER_BYTES, -1])
def test_scales_alone_are_those_of_the_tensor(folder, monkeypatch, limit):
    monkeypatch.setattr(side_reading, "SIDES_TOGETHER_BYTES", limit)
    with Container(folder) as container:
        names = [record.name for record in container.manifest.tensors]
        tensors = [container.tensor(name) for name in names]
        quantized = [one for one in tensors if getattr(one, "scales", None) is not None]
        assert quantized
        for tensor in quantized:
            scales, columns = container.scales(tensor.record.name)
            assert np.array_equal(scales, tensor.scales)
            assert (columns is None) == (tensor.columns is None)
            if columns is not None:
                assert np.array_equal(columns.scales, tensor.columns.scales)


def test_side_tensors_that_lie_apart_are_read_one_by_one(folder, monkeypatch):
    with Container(folder) as container:
        names = [record.name for record in container.manifest.tensors]
        together = [read_tensor_bytes(container, name) for name in names]
        reads = []
        monkeypatch.setattr(side_reading, "SIDES_TOGETHER_BYTES", -1)
        monkeypatch.setattr(
            SafeFile,
            "read",
            lambda *where, read=SafeFile.read: (reads.append(where[1:]), read(*where))[1],
        )
        assert [read_tensor_bytes(container, name) for name in names] == together
        coded = sum(isinstance(container.tensor(name), StoredTensor) for name in names)
    assert len(reads) >= 4 * coded > 0, (
        "chunks and shape at least, for both times that each tensor was opened"
    )


def test_a_damaged_chunk_is_named_with_its_place(folder, tmp_path):
    damaged = tampering.copy_of(folder, tmp_path / "c")
    path, place = tampering.payload_place(damaged, "l", 1)
    tampering.flip_bit(path, place + 5)
    with Container(damaged) as container:
        tensor = container.tensor("l")
        with pytest.raises(ChecksumError, match="stored bytes are damaged") as caught:
            read_symbols(tensor)
        assert (caught.value.file, caught.value.tensor, caught.value.chunk, caught.value.byte) == (
            SHARD,
            "l",
            1,
            place,
        )
        slots = tensor.read_slots(0, 1, bytearray(tensor.slots_bytes(0, 1)))
        assert len(tensor.decode_chunk(0, slots, 0)) == 2560
        assert len(read_tensor_bytes(container, "q")) == 24 * 80 * 2


def test_a_boolean_of_2_is_named_with_its_tensor(tmp_path):
    """The error of a wrong boolean named neither file nor tensor."""
    source = write_source(tmp_path / "source", {"mask": ("BOOL", np.zeros((64, 64), np.uint8))})
    convert(source, tmp_path / "c", scheme="lossless")

    def edit(tensors):
        symbols = bytearray(4096)
        symbols[9] = 2
        table = tensors["mask_chunks"][2]
        table[32:37] = (4096).to_bytes(4, "little") + b"\0"
        tensors["mask"] = ("U8", [4096], symbols)
        fix_chunks(tensors, "mask")

    rewrite_shard(tmp_path / "c", edit)
    tampering.reseal(
        tmp_path / "c",
        lambda d: d["tensors"][0]["planes"][0].update(stored_bytes=4096, codec="raw"),
    )
    with (
        Container(tmp_path / "c") as container,
        pytest.raises(DecodeError, match="boolean") as caught,
    ):
        read_tensor_bytes(container, "mask")
    assert (caught.value.file, caught.value.tensor) == (SHARD, "mask")


def test_plain_tensors_and_their_errors(folder, tmp_path):
    with Container(folder) as container:
        tensor = container.tensor("n")
        assert isinstance(tensor, PlainTensor)
        assert tensor.read() == np.linspace(0, 1, 9, dtype=np.float32).tobytes()
        place = tensor.offset
        with pytest.raises(SchemaError, match="no such tensor"):
            container.tensor("nothing")
    damaged = tampering.copy_of(folder, tmp_path / "c")
    tampering.flip_bit(damaged / SHARD, place + 3)
    with Container(damaged) as container, pytest.raises(ChecksumError) as caught:
        read_tensor_bytes(container, "n")
    assert (caught.value.tensor, caught.value.byte) == ("n", place)


def test_a_pinned_manifest(folder):
    digest = sha256_hex((folder / MANIFEST_NAME).read_bytes())
    with Container(folder, expected_manifest_sha256=digest.upper()) as container:
        assert container.manifest_sha256 == digest
    with pytest.raises(ChecksumError, match="not the expected one"):
        Container(folder, expected_manifest_sha256="0" * 64)


def test_opening_reads_the_manifest_only(folder, tmp_path):
    alone = tampering.copy_of(folder, tmp_path / "c")
    (alone / SHARD).unlink()
    with Container(alone) as container:
        assert len(container.records) == 4
        with pytest.raises(TruncatedError, match="missing"):
            container.tensor("n")


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"x")]
)
def test_what_is_no_container(tmp_path, make):
    make(tmp_path / "c")
    with pytest.raises(NotAContainerError):
        Container(tmp_path / "c")


def test_side_files(folder, tmp_path):
    with Container(folder) as container:
        record = container.manifest.file("config.json")
        assert container.read_side_file(record) == (folder / "config.json").read_bytes()
        container.check_presence(record)
        container.check_file(record)
        other = FileRecord(name="config.json", bytes=record.bytes, sha256="0" * 64)
        container.check_presence(other)
        for check in (container.read_side_file, container.check_file):
            with pytest.raises(ChecksumError, match="sha256"):
                check(other)


def test_size_of_a_container(folder):
    with Container(folder) as container:
        assert container.stored_bytes == sum(
            (folder / name).stat().st_size for name in (MANIFEST_NAME, SHARD)
        )


def test_a_closed_container_opens_its_shards_again(folder):
    container = Container(folder)
    first = read_tensor_bytes(container, "l")
    container.close()
    container.close()
    assert read_tensor_bytes(container, "l") == first
    container.close()


def test_threads_share_a_container(folder):
    with Container(folder) as container:
        expected = {name: read_tensor_bytes(container, name) for name in container.records}
    failures = []
    with Container(folder) as container:

        def read():
            for name, data in expected.items():
                if read_tensor_bytes(container, name) != data:
                    failures.append(name)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def _error(check, *arguments):
    try:
        check(*arguments)
    except FormatError as exc:
        return type(exc), str(exc)
    return None


def _coded(container):
    """Yields every coded tensor and the number of its chunks."""
    for tensor in map(container.tensor, container.records):
        if isinstance(tensor, StoredTensor):
            yield tensor, len(tensor.table.records)


def test_chunks_checked_together_fail_as_the_first_that_fails_alone(folder):
    padded = 0
    with Container(folder) as container:
        for tensor, count in _coded(container):
            slots = np.frombuffer(
                tensor.read_slots(0, count, bytearray(tensor.slots_bytes(0, count))), np.uint8
            ).copy()
            tensor.check_chunks(0, count, slots)
            for chunk, record in enumerate(tensor.table.chunks):
                last = memoryview(slots)[record.begin : record.end]
                last[-1] ^= 1
                expected = _error(tensor.stored_chunk, chunk, memoryview(slots), 0)
                assert expected is not None and expected == _error(
                    tensor.check_chunks, 0, count, slots
                )
                assert (
                    chunk == 0
                    or _error(tensor.check_chunks, 0, chunk, slots[: record.begin]) is None
                )
                sealed = _with_checksum(
                    tensor, chunk, xxh3(last)
                )  # a checksum that fits: only the padding may be wrong
                expected = _error(sealed.stored_chunk, chunk, memoryview(slots), 0)
                assert expected == _error(sealed.check_chunks, 0, count, slots)
                assert (expected is not None) == (record.stored_bytes < len(last))
                padded += expected is not None
                last[-1] ^= 1
    assert padded


def test_chunks_decoded_together_have_the_bytes_of_one_by_one_or_are_left_to_it(folder):
    """Any damage, and anything behind a frame, makes the fast path give up.

    The slow one names the fault.
    """
    refused, several = set(), 0
    with Container(folder) as container:
        for tensor, count in _coded(container):
            slots = bytearray(tensor.read_slots(0, count, bytearray(tensor.slots_bytes(0, count))))
            expected = [
                bytes(sound(one)) for one in tensor.decode_run(0, count, memoryview(slots), 0)
            ]
            assert [
                bytes(one) for one in tensor.decode_together(0, count, memoryview(slots))
            ] == expected
            (last,) = tensor.decode_together(count - 1, count, _slot(tensor, slots, count - 1))
            assert bytes(last) == expected[-1]
            several += count > 1
            for chunk, record in enumerate(tensor.table.chunks):
                if record.codec != ZSTD.codec_id:
                    continue
                for byte in range(record.begin, record.end):
                    slots[byte] ^= 0x41
                    assert tensor.decode_together(0, count, memoryview(slots)) is None, (
                        "a wrong checksum"
                    )
                    sealed = _with_checksum(
                        tensor, chunk, xxh3(memoryview(slots)[record.begin : record.end])
                    )
                    (one,) = sealed.decode_run(chunk, chunk + 1, memoryview(slots), 0)
                    found = sealed.decode_together(0, count, memoryview(slots))
                    if isinstance(one, FormatError):
                        assert found is None or "code -128" in str(one), (
                            "which is for whoever asks to check"
                        )
                        refused.add(one.message.partition(":")[0])
                    else:
                        assert found is None or bytes(found[chunk]) == bytes(one)
                    slots[byte] ^= 0x41
    assert several
    assert len(refused) > 3


def _slot(tensor, slots, chunk):
    record = tensor.table.chunks[chunk]
    return memoryview(slots)[record.begin : record.end]


@pytest.mark.parametrize("behind", [b"\0", b"\x28\xb5\x2f\xfd", ZSTD.encode(bytes(100))])
def test_nothing_may_stand_behind_a_frame_that_is_decoded_together(behind):
    raw = bytes(range(256)) * 40
    frame = ZSTD.encode(raw)
    both = memoryview(frame + frame + behind)
    spans = [(0, len(frame)), (len(frame), len(frame))]
    assert [bytes(one) for one in ZSTD.decode_together(both, spans, [len(raw)] * 2)] == [raw, raw]
    longer = [(0, len(frame)), (len(frame), len(frame) + len(behind))]
    assert ZSTD.decode_together(both, longer, [len(raw)] * 2) is None
    assert ZSTD.decode_together(both, longer[1:], [len(raw)]) is None
    assert ZSTD.decode_together(both, spans, [len(raw), len(raw) + 1]) is None


def _with_checksum(tensor, chunk, checksum):
    records = tensor.table.records.copy()
    records["xxh3"][chunk] = checksum
    return replace(tensor, table=replace(tensor.table, records=records))
