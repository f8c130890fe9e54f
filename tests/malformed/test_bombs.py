"""Small files that ask for much work: time and memory are bounded, signals end the read."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from codecllm.formats.checksums import sha256_hex, xxh3_hex
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    LayoutError,
    LimitError,
    SchemaError,
    UsageError,
)
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.formats.shards.consistency import check_shard_header
from codecllm.formats.shards.safetensors_header import pack_header, parse_header
from codecllm.formats.strict_json import parse_json_object
from tests import tampering
from tests.malformed.measure import measured

DIGEST, XXH3 = "ab" * 32, "0" * 16
HEAD = '{"format":"codecllm","format_version":"1.1","required_features":[],"writer":{},'
SOURCE = '"source":{"repo":null,"commit":null,"tensor_bytes":0},'
OPTIONS = (
    '"options":{"scheme":"int8","include":[],"exclude":[],"non_finite":"error",'
    '"max_shard_bytes":5},"files":[],'
)
SHARD = (
    f'{{"name":"model-00001-of-00001.safetensors","bytes":9,"sha256":"{DIGEST}",'
    f'"header_xxh3":"{XXH3}"}}'
)
VALID_HEAD = HEAD + SOURCE + OPTIONS + f'"shards":[{SHARD}],'
ALIAS = '{{"name":"{}","dtype":"U8","shape":[],"scheme":"alias","alias_of":"a"}}'
RAW = (
    f'{{{{"name":"{{}}","dtype":"U8","shape":[],"scheme":"raw","shard":0,"digest":"{DIGEST}",'
    f'"xxh3":"{XXH3}"}}}}'
)


def _fields(value, count):
    """Returns the text of an object with `count` fields of one value."""
    return "{" + ",".join(f'"{number}":{value}' for number in range(count)) + "}"


def _list(name, record, count):
    return f'"{name}":[' + ",".join(map(record.format, range(count))) + "]"


def _sealed(*parts):
    text = (",".join(part.rstrip(",") for part in parts) + ",").encode()
    return text + b'"manifest_sha256":"' + sha256_hex(text).encode() + b'"}\n'


MANIFESTS = {
    "records without fields": (
        lambda: _sealed(HEAD, _list("tensors", '{{"scheme":"int8"}}', 400_000)),
        SchemaError,
        "tensors.0",
    ),
    "wrong entries of writer": (
        lambda: _sealed(HEAD.replace('"writer":{},', ""), f'"writer":{_fields(1, 2_000_000)}'),
        LimitError,
        "too long",
    ),
    "wrong entries of writer within the limit": (
        lambda: _sealed(HEAD.replace('"writer":{},', ""), f'"writer":{_fields(1, 25_000)}'),
        SchemaError,
        "writer.0",
    ),
    "empty objects in an extension": (
        lambda: _sealed(HEAD, '"x_a":[' + ",".join(["{}"] * 20_000_000) + "]"),
        LimitError,
        "too long",
    ),
    "many extensions": (
        lambda: _sealed(HEAD, *(_list(f"x_{number}", "{{}}", 9_000) for number in range(200))),
        LimitError,
        "too long",
    ),
    "many fields": (
        lambda: _sealed(HEAD, *(f'"x_{i}":0' for i in range(300))),
        LimitError,
        "too many fields",
    ),
    "aliases of nothing": (
        lambda: _sealed(VALID_HEAD, _list("tensors", ALIAS, 40_000)),
        SchemaError,
        "alias",
    ),
    "too many tensors": (
        lambda: _sealed(VALID_HEAD, _list("tensors", ALIAS, 262_145)),
        LimitError,
        "too many tensors",
    ),
    "a record with many fields": (
        lambda: _sealed(VALID_HEAD, f'"tensors":[{_fields(0, 1_000_000)}]'),
        LimitError,
        "too long",
    ),
    "a long list in a record": (
        lambda: _sealed(VALID_HEAD, '"tensors":[{"name":"a","shape":[' + "0," * 1_000_000 + "0]}]"),
        LimitError,
        "too long",
    ),
    "a long number": (
        lambda: _sealed(VALID_HEAD, '"tensors":[{"shard":' + "1" * 1_000_000 + "}]"),
        LimitError,
        "too",
    ),
    "lists before the version": (
        lambda: _sealed('{"tensors":[' + ",".join(["{}"] * 200_000) + "]", HEAD[1:]),
        SchemaError,
        "tensors.0",
    ),
    "shards": (
        lambda: _sealed(HEAD, _list("shards", '{{"name":"{}"}}', 65_537)),
        SchemaError,
        "shards.0",
    ),
}  # fmt: skip


@pytest.mark.long_input
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_costs_no_more_than_its_valid_records(name):
    build, expected, words = MANIFESTS[name]
    data = build()
    with measured() as cost, pytest.raises(CodecLLMError) as caught:
        parse_manifest(data)
    assert type(caught.value) is expected, repr(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000
    cost.check(len(data) / (1 << 20))


ENTRY = '"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
HEADERS = {
    "empty objects": ("{" + ",".join(f'"{i}":{{}}' for i in range(1_000_000)) + "}", SchemaError),
    "metadata of lists": ('{"__metadata__":{"a":[' + "[]," * 5_000_000 + "[]]}}", SchemaError),
    "long metadata": (
        '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(1_000_000)) + "}}",
        LimitError,
    ),
    "too many tensors": (
        "{" + ",".join(map(ENTRY.format, range(262_145))) + "}",
        LimitError,
    ),
    "a long entry": ('{"a":[' + "0," * 5_000_000 + "0]}", LimitError),
}


@pytest.mark.long_input
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_costs_no_more_than_its_valid_entries(name):
    text, expected = HEADERS[name]
    raw = len(text).to_bytes(8, "little") + text.encode()
    with measured() as cost, pytest.raises(CodecLLMError) as caught:
        parse_header(raw, file_bytes=len(raw), file="f")
    assert type(caught.value) is expected, repr(caught.value)
    cost.check(len(raw) / (1 << 20))


@pytest.mark.long_input
@pytest.mark.parametrize("item", ["{}", "[]", '"ab"', "0"])
def test_a_text_that_is_decoded_as_a_whole_holds_a_limited_number_of_values(item):
    data = ('{"a":[' + ",".join([item] * 5_000_000) + "]}").encode()
    with measured() as cost, pytest.raises(LimitError, match="too many values"):
        parse_json_object(data, file="f", max_bytes=len(data))
    cost.check()


def _swollen(folder, rows):
    """Says that the plain tensor has `rows` times a million elements."""

    def edit(document):
        record = document["tensors"][3]
        assert record["name"] == "n"
        record["shape"] = [rows, 250_000]

    tampering.reseal(folder, edit)


def test_tensors_larger_than_what_is_stored_of_them_are_refused(folder, monkeypatch):
    _swollen(folder, 1_000)
    with pytest.raises(LimitError, match="CODECLLM_MAX_EXPANSION=N allows") as caught:
        Container(folder)
    assert "1000" in str(caught.value.got)
    with Container(folder, max_expansion=1e6) as container:
        assert container.records["n"].source_bytes == 1_000_000_000
    monkeypatch.setenv("CODECLLM_MAX_EXPANSION", "1e6")
    Container(folder).close()
    monkeypatch.setenv("CODECLLM_MAX_EXPANSION", "much")
    with pytest.raises(UsageError, match="not a number"):
        Container(folder)


def test_small_tensors_may_have_any_ratio(folder):
    _swollen(folder, 250)
    Container(folder).close()


def test_a_chunk_table_that_is_too_long_for_its_payload_is_not_read(folder):
    with Container(folder) as container:
        file, header = container.shard(0)
        entry = header.tensors["q_chunks"]
        payload = header.tensors["q"].bytes
        header.tensors["q_chunks"] = entry._replace(end=entry.start + 33 + payload)
        reads = []
        file.read = lambda *place: reads.append(place)
        with pytest.raises(LayoutError, match="too long for its payload"):
            container.tensor("q")
        assert not reads


@pytest.mark.many_inputs
def test_a_signal_ends_the_reading_of_a_long_manifest(tmp_path):
    folder = tmp_path / "container"
    folder.mkdir()
    data = _sealed(VALID_HEAD, _list("tensors", RAW, 250_000))
    (folder / MANIFEST_NAME).write_bytes(data)
    process = subprocess.Popen(
        [sys.executable, "-m", "codecllm", "info", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    read = f"/proc/{process.pid}/io"
    while process.poll() is None:
        with open(read) as file:
            if int(file.readline().split()[1]) > len(data):
                break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM" in errors


@pytest.mark.long_input
def test_headers_of_many_shards_beside_many_aliases_cost_their_own_entries_only():
    names = [f"model-{number:05d}-of-00300.safetensors" for number in range(1, 301)]
    header = pack_header([], {})
    shards = ",".join(
        f'{{"name":"{name}","bytes":{len(header)},"sha256":"{DIGEST}",'
        f'"header_xxh3":"{xxh3_hex(header)}"}}'
        for name in names
    )
    target = RAW.format("a")
    aliases = ",".join(ALIAS.format(f"t{number}") for number in range(40_000))
    head = HEAD + SOURCE + OPTIONS + f'"shards":[{shards}],'
    manifest = parse_manifest(_sealed(head, f'"tensors":[{target},{aliases}]'))
    with measured() as cost:
        for number in range(1, len(names)):
            check_shard_header(
                manifest, number, parse_header(header, file_bytes=len(header), file="f")
            )
    cost.check()
