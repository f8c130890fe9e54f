"""Branches that no container of the other tests takes: short reads, other machines, odd values."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard

import codecllm
from codecllm.formats import files, limits, machine, stored_tensor
from codecllm.formats.codecs import native, zstd
from codecllm.formats.codecs.entropy import counted_entropy_bits, symbol_counts
from codecllm.formats.codecs.rans_fit import fit_frequencies
from codecllm.formats.codecs.rans_groups import pack_group_tables, parse_group_tables
from codecllm.formats.codecs.zstd import ZstdCodec
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.errors import (
    ChecksumError,
    DecodeError,
    LayoutError,
    LimitError,
    SchemaError,
    TruncatedError,
    UsageError,
)
from codecllm.formats.files import SafeFile, write_atomically
from codecllm.formats.manifest.manifest import MANIFEST_NAME, pack_manifest, record_bytes
from codecllm.formats.reference import (
    read_codes,
    read_rows,
    read_run_bytes,
    read_run_codes,
    read_tensor_bytes,
)
from codecllm.formats.shards.consistency import MAX_EXPANSION, check_expansion
from codecllm.formats.shards.safetensors_header import parse_header
from codecllm.formats.shards.shard_writer import PlannedTensor, ShardWriter
from codecllm.formats.shards.side_tensors import side_tensors
from codecllm.formats.strict_json import JsonWalker, parse_json_object
from codecllm.formats.tile_run import decode_natively, decode_plainly
from tests.malformed.builders import SHARD, make_container, make_rans_container


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_container(tmp_path_factory.mktemp("rare"))


@pytest.fixture
def container(folder):
    with Container(folder) as opened:
        yield opened


def test_symbols_are_counted_alike(path):
    symbols = np.random.default_rng(0).integers(0, 5, 1000).astype(np.uint8)
    for stride in (1, 3):
        counts = np.bincount(symbols[::stride], minlength=256)
        assert symbol_counts(symbols, stride).tolist() == counts.tolist()
    assert counted_entropy_bits(np.array([4, 0, 4, 8])) == pytest.approx(24)


def test_a_symbol_whose_frequency_is_one_gives_nothing_more():
    counts = np.ones(256, np.int64)
    counts[:2] = 1 << 20
    assert fit_frequencies(counts, 8).tolist() == [1] * 256


@pytest.mark.parametrize("stale", [{}, {"interface": lambda: native._INTERFACE - 1}])
def test_a_core_of_other_sources_is_not_used(monkeypatch, stale):
    """A checkout that moved on without a new build."""
    monkeypatch.setattr(native, "_SETTING", "")
    module = SimpleNamespace(**stale)
    monkeypatch.setitem(sys.modules, "codecllm._native", module)
    monkeypatch.setattr(codecllm, "_native", module, raising=False)
    with pytest.warns(RuntimeWarning, match="built from other sources"):
        assert native._load() is None


def test_the_core_is_named_or_why_there_is_none(monkeypatch):
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "_SETTING", "")
    assert native.describe().startswith("not built")
    monkeypatch.setattr(native, "_SETTING", "0")
    assert native.describe() == "turned off by CODECLLM_NATIVE=0"
    assert native._load() is None


def test_without_the_module_of_the_core_there_is_none(monkeypatch):
    monkeypatch.setattr(native, "_SETTING", "")
    monkeypatch.delattr(codecllm, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "codecllm._native", None)
    assert native._load() is None


@pytest.mark.skipif(native.core is None, reason="the native core is not built here")
def test_the_environment_chooses_the_kernels():
    code = "from codecllm.formats.codecs import native; print(native.describe())"
    environment = {**os.environ, "CODECLLM_NATIVE": "portable"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "portable kernels\n"


@pytest.mark.skipif(native.core is None, reason="the native core is not built here")
@pytest.mark.parametrize("as_json", [False, True])
def test_kernels_that_are_not_there_end_a_command_in_one_line(as_json):
    """Before its options are read: the package obeys the variable when it is imported."""
    command = [sys.executable, "-m", "codecllm", "info", "out", *(["--json"] if as_json else [])]
    environment = {**os.environ, "CODECLLM_NATIVE": "none\udcff"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    words = "CODECLLM_NATIVE names no kernels that this machine can run, got 'none"
    if as_json:
        assert not done.stderr
        facts = json.loads(done.stdout)
        assert (facts["error"], facts["exit_code"]) == ("UsageError", 2)
        assert facts["message"].startswith(words)
    else:
        assert done.stderr.startswith(f"error: {words}")
        assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.skipif(native.core is None, reason="the native core is not built here")
def test_kernels_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(native, "_SETTING", "none")
    with pytest.raises(UsageError, match=r"CODECLLM_NATIVE names no kernels.*portable"):
        native._load()


def test_cores_and_memory_of_other_systems(monkeypatch):
    assert machine.cores() >= 1
    assert machine.available_memory() > 1 << 20
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cores() == 1
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for answer in (lambda *_: io.StringIO("MemTotal: 5 kB\n"), _refuse):
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", answer)
            found = machine.available_memory()
        assert found == whole


def _refuse(*_, **__):
    raise PermissionError(13, "no")


def test_parts_of_a_tensor_are_those_of_the_whole(container):
    for name in ("l", "q", "h.0.attn.c_attn.weight"):
        tensor = container.tensor(name)
        rows, cols = tensor.record.shape
        whole = read_tensor_bytes(container, name)
        row_bytes = cols * DTYPES[tensor.record.dtype].itemsize
        for first, last in ((0, rows), (1, 2), (rows - 3, rows), (5, 5)):
            assert read_rows(tensor, first, last) == whole[first * row_bytes : last * row_bytes]
        tiles = range(len(tensor.table.chunks) // tensor.table.planes)
        assert len(read_run_bytes(tensor, tiles)) == len(whole)
        if name != "l":
            parts = read_run_codes(tensor, tiles)
            assert sum(part.size for part in parts) == read_codes(tensor).size
            assert sorted(np.concatenate([part.ravel() for part in parts])) == sorted(
                read_codes(tensor).ravel()
            )


def test_without_the_core_numpy_decodes(container, monkeypatch):
    monkeypatch.setattr(native, "core", None)
    assert not decode_natively(container.tensor("l"), range(1), None, "source", memoryview(b""))


def test_a_run_of_no_tiles_writes_nothing(container):
    tensor = container.tensor("l")
    out = np.full(4, 7, np.uint16)
    for decode in (decode_natively, decode_plainly):
        decode(tensor, range(3, 3), out, "source", memoryview(b""))
    assert out.tolist() == [7] * 4
    assert tensor.decode_together(3, 3, memoryview(b"")) is None


@pytest.mark.skipif(native.core is None, reason="the native core is not built here")
def test_a_run_that_the_core_or_libzstd_refuses_is_left_to_numpy(container, monkeypatch):
    tensor = container.tensor("q")
    count = len(tensor.table.chunks)
    slots = tensor.read_slots(0, count, bytearray(tensor.slots_bytes(0, count)))
    out = np.empty(tensor.record.shape, np.uint16)
    tiles = range(count // tensor.table.planes)
    assert any(chunk.codec == zstd.ZstdCodec.codec_id for chunk in tensor.table.chunks)
    monkeypatch.setattr(ZstdCodec, "decompress_together", lambda *_: None)
    assert not decode_natively(tensor, tiles, out, "BF16", slots)
    slots[0] ^= 1
    assert not decode_natively(tensor, tiles, out, "BF16", slots)
    with pytest.raises(ChecksumError):
        decode_plainly(tensor, tiles, out, "BF16", slots)


def test_frames_that_are_not_whole_are_left_to_the_slow_path():
    codec = ZstdCodec()
    symbols = bytes(range(256)) * 8
    frame = codec.encode(symbols)
    pair, sizes = [(0, len(frame)), (len(frame), len(frame))], [len(symbols)] * 2
    assert codec.decode_together(memoryview(frame * 2), pair, sizes) == [symbols] * 2
    summed = zstandard.ZstdCompressor(write_checksum=True).compress(symbols)
    spans = [(0, len(summed)), (len(summed), len(summed))]
    assert codec.decode_together(memoryview(summed * 2), spans, sizes) is None
    cut = frame[:9]
    spans = [(0, len(cut)), (len(cut), len(cut))]
    assert codec.decode_together(memoryview(cut * 2), spans, sizes) is None
    broken = bytearray(frame * 2)
    broken[7] |= 6  # the first block is of a kind that does not exist
    assert codec.decompress_together(memoryview(broken), pair, sizes) is None


def test_a_library_that_gives_another_size_is_not_believed(monkeypatch):
    class Wrong:
        def decompress(self, stored, **_):
            return b""

    codec = ZstdCodec()
    frame = codec.encode(b"symbols")
    monkeypatch.setattr(zstd, "_STATE", type("State", (), {"decompressor": Wrong()}))
    with pytest.raises(DecodeError, match="wrong size"):
        codec.decode(frame, 7)


def test_sparse_symbols_take_the_smaller_frame():
    codec = ZstdCodec()
    symbols = np.zeros(100_000, np.uint8)
    symbols[::5000] = 1
    frame = codec.encode_sparse(symbols)
    assert len(frame) <= len(codec.encode(symbols))
    assert codec.decode(frame, symbols.size) == symbols.tobytes()
    noise = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    assert codec.decode(codec.encode_sparse(noise), 1000) == noise.tobytes()


def test_files_that_are_too_long_are_not_read(folder, container, tmp_path, monkeypatch):
    with open(tmp_path / MANIFEST_NAME, "wb") as file:
        file.truncate(limits.MANIFEST_BYTES + 1)
    with pytest.raises(LimitError, match="manifest is too long"):
        Container(tmp_path)
    monkeypatch.setattr(limits, "SIDE_FILE_BYTES", 10)
    with pytest.raises(LimitError, match="too large to read"):
        container.read_side_file(container.manifest.file("config.json"))


def test_a_file_that_may_not_be_opened_is_an_error_of_the_system(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "open", _refuse)
    with pytest.raises(PermissionError):
        SafeFile(tmp_path, "file")


def test_short_reads_are_continued(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with SafeFile(tmp_path, "file") as file:
        monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: b"short")
        assert file.read(10, 50) == bytes(range(10, 60))


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwritev

    def write_some(descriptor, views, offset):
        return real(descriptor, [views[0][: max(1, len(views[0]) // 2)]], offset)

    monkeypatch.setattr(os, "pwritev", write_some)
    data = np.arange(300, dtype=np.uint8)
    writer = ShardWriter(tmp_path / "s", [PlannedTensor("a", DTYPES["U8"], (300,), 300)], {})
    writer.write(data[:7], data[7:])
    writer.end_tensor("a", "U8", (300,))
    writer.finish()
    assert (tmp_path / "s").read_bytes().endswith(data.tobytes())


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(files.os, "replace", _refuse)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_bound_of_expansion(container, monkeypatch):
    check_expansion(container.manifest, 0)  # below the size that is always free
    monkeypatch.setattr(limits, "EXPANSION_FREE_BYTES", 0)
    with pytest.raises(LimitError, match="too large for what is stored"):
        check_expansion(container.manifest, 0.5)
    monkeypatch.setenv(MAX_EXPANSION, "100")
    check_expansion(container.manifest)
    for text in ("many", "nan", "", "-1", "inf", "1e400"):
        monkeypatch.setenv(MAX_EXPANSION, text)
        with pytest.raises(UsageError, match="not a number"):
            check_expansion(container.manifest)


def test_a_header_beyond_its_bound_is_not_parsed():
    raw = (30).to_bytes(8, "little") + b"{" + b" " * 29
    with pytest.raises(LimitError, match="header is too long"):
        parse_header(raw, file_bytes=38, file="s", max_header_bytes=29)


def test_plain_tensors_have_no_side_tensors(container):
    assert side_tensors(container.records["n"]) == []
    assert side_tensors(container.records["q"]) != []


def test_the_size_of_a_record_is_that_in_the_manifest(container):
    """The difference that one record more makes."""
    manifest = container.manifest
    fewer = manifest.model_copy(update={"tensors": manifest.tensors[:-1]})
    difference = len(pack_manifest(manifest)) - len(pack_manifest(fewer))
    assert record_bytes(manifest.tensors[-1]) == difference


def test_slots_behind_the_end_of_the_file_name_their_chunk(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with Container(copy) as opened:
        tensor = opened.tensor("q")
        count = len(tensor.table.chunks)
        os.truncate(copy / SHARD, tensor.offset)
        with pytest.raises(TruncatedError) as caught:
            tensor.read_slots(0, count, bytearray(tensor.slots_bytes(0, count)))
        assert (caught.value.tensor, caught.value.chunk) == ("q", 0)


@pytest.mark.parametrize("suffix", ["_chunks", "_shape", "_scale"])
def test_a_shard_that_is_cut_inside_side_data_names_the_tensor(folder, tmp_path, suffix):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with Container(copy) as opened:
        file, header = opened.shard(0)
        os.truncate(copy / SHARD, header.tensors["q" + suffix].start + 1)
        with pytest.raises(TruncatedError) as caught:
            opened.tensor("q")
        assert (caught.value.file, caught.value.tensor) == (file.name, "q")


def test_a_plain_tensor_that_a_cut_shard_lacks_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with Container(copy) as opened:
        os.truncate(copy / SHARD, opened.tensor("n").offset + 1)
        with pytest.raises(TruncatedError) as caught:
            read_tensor_bytes(opened, "n")
        assert caught.value.tensor == "n"


def test_slots_that_change_between_two_checks_are_an_error(container, monkeypatch):
    tensor = container.tensor("q")
    count = len(tensor.table.chunks)
    slots = tensor.read_slots(0, count, bytearray(tensor.slots_bytes(0, count)))
    data = np.frombuffer(slots, np.uint8)
    tensor.check_chunks(0, count, data)
    real = stored_tensor.xxh3_each
    monkeypatch.setattr(stored_tensor, "xxh3_each", lambda views: real(views) ^ 1)
    with pytest.raises(ChecksumError, match="changed while they were checked"):
        tensor.check_chunks(0, count, data)


def test_bounds_of_json():
    many = b'{"a":[' + b"0," * limits.JSON_VALUES + b"0]}"
    with pytest.raises(LimitError, match="too many values"):
        parse_json_object(many, file="f", max_bytes=len(many))
    with pytest.raises(LimitError, match="too deep"):
        list(JsonWalker(b"{}", file="f", max_depth=0).members())
    with pytest.raises(LimitError, match="too deep"):
        JsonWalker(b"[" * 100_000, file="f").value(100_000)
    for text, most in ((b"123456789", 4), (b"1.5 ", 3)):
        with pytest.raises(LimitError, match="goes on behind the limit"):
            JsonWalker(text, file="f").value(most)
    assert JsonWalker(b"1234", file="f").value(4) == 1234
    with pytest.raises(SchemaError, match="a key in double quotes is missing"):
        list(JsonWalker(b"{1:2}", file="f").members())
    with pytest.raises(SchemaError, match="not JSON"):
        JsonWalker(b"nothing", file="f").value(99)
    with pytest.raises(SchemaError, match="not UTF-8"):
        JsonWalker(b'"\xff"', file="f").value(9)
    with pytest.raises(SchemaError, match="'b' stands twice"):
        parse_json_object(b'{"a":1,"b":2,"c":3,"b":4}', file="f", max_bytes=99)


def test_tables_without_their_sizes(tmp_path):
    with Container(make_rans_container(tmp_path)) as opened:
        tensor = opened.tensor("q")
        data = pack_group_tables(tensor.tables.groups, tensor.table.planes, [])
        where = {"chunks": tensor.table, "file": "f", "tensor": "q"}
        with pytest.raises(LayoutError, match="lack sizes"):
            parse_group_tables(data, **where)
