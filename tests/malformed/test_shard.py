"""Malformed shards whose outer checksums fit.

Hostile headers, chunk tables, frames, codes and scales.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import zstandard

from codecllm.formats.codecs import CODEC_IDS
from codecllm.formats.errors import (
    CodecLLMError,
    DecodeError,
    LayoutError,
    LimitError,
    SchemaError,
    TruncatedError,
    UnsupportedVersionError,
)
from tests import tampering
from tests.malformed.builders import (
    SHARD,
    edit_header,
    fix_chunks,
    put_shard,
    read_tensors,
    rewrite_shard,
)

C = "h.0.attn.c_attn.weight"


def _header(change):
    return lambda folder: edit_header(folder, change)


def _entry(name, **fields):
    return _header(lambda header: header[name].update(fields))


def _raw_text(change):
    """A change of the header's JSON text."""
    return _header(lambda header: change(json.dumps(header).encode()))


def _table(offset, data, tensor="q"):
    """Overwrites bytes of a chunk table."""

    def edit(tensors):
        tensors[f"{tensor}_chunks"][2][offset : offset + len(data)] = data

    return lambda folder: rewrite_shard(folder, edit)


def _resized_table(change, tensor="q"):
    def edit(tensors):
        dtype, _, data = tensors[f"{tensor}_chunks"]
        data = bytearray(change(bytes(data)))
        tensors[f"{tensor}_chunks"] = (dtype, [len(data)], data)

    return lambda folder: rewrite_shard(folder, edit)


def _frame(frame_of, tensor="q"):
    """Puts another frame into the only chunk of an int8 tensor.

    Record, slot, checksum and sizes all fit it.
    """

    def edit(tensors):
        dtype, _, payload = tensors[tensor]
        table = tensors[f"{tensor}_chunks"][2]
        stored = int.from_bytes(table[32:36], "little")
        frame = frame_of(bytes(payload[:stored]))
        table[32:36] = len(frame).to_bytes(4, "little")
        payload = bytearray(frame.ljust(-(-len(frame) // 16) * 16, b"\0"))
        tensors[tensor] = (dtype, [len(payload)], payload)
        fix_chunks(tensors, tensor)

    def damage(folder):
        rewrite_shard(folder, edit)
        index = {"q": 1, C: 2}[tensor]

        def planes(document):
            from tests.malformed.builders import split_shard

            table = split_shard(folder)[0][f"{tensor}_chunks"][2]
            document["tensors"][index]["planes"][0]["stored_bytes"] = int.from_bytes(
                table[32:36], "little"
            )

        tampering.reseal(folder, planes)

    return damage


def _codes(value):
    """A well-formed frame with one code changed."""

    def frame(old):
        codes = bytearray(zstandard.ZstdDecompressor().decompress(old))
        codes[5] = value & 0xFF
        return zstandard.ZstdCompressor(level=1).compress(bytes(codes))

    return frame


def _scale(value):
    def edit(tensors):
        tensors["q_scale"][2][8:12] = np.float32(value).tobytes()

    return lambda folder: rewrite_shard(folder, edit)


def _with_window(old):
    parameters = zstandard.ZstdCompressionParameters(window_log=24, write_content_size=True)
    codes = zstandard.ZstdDecompressor().decompress(old)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=len(codes))
    return stream.compress(codes) + stream.flush()


def _wrong_size(old):
    return zstandard.ZstdCompressor().compress(zstandard.ZstdDecompressor().decompress(old) + b"\0")


def _bomb(old):
    return zstandard.ZstdCompressor().compress(bytes(1 << 26))


def _dictionary(old):
    codes = zstandard.ZstdDecompressor().decompress(old)
    samples = [bytes([i % 7]) * 200 + bytes(range(i % 200)) for i in range(400)]
    return zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(2000, samples)).compress(
        codes
    )


def _damaged_frame(old):
    return old[:60] + bytes(40) + old[100:]


def _padding(folder):
    def edit(tensors):
        stored = int.from_bytes(tensors["q_chunks"][2][32:36], "little")
        assert stored % 16
        tensors["q"][2][-1] = 1
        fix_chunks(tensors, "q")

    rewrite_shard(folder, edit)


def _shape(folder):
    def edit(tensors):
        tensors["l_shape"][2][:] = np.array([64, 40], "<i8").tobytes()

    rewrite_shard(folder, edit)


def _cut(folder):
    data = (folder / SHARD).read_bytes()
    put_shard(folder, data[:100], b"")


def _swapped_chunks(folder):
    """The payloads of two tensors of one shape change places; their chunk tables stay."""

    def edit(tensors):
        for name in ("", "_chunks", "_scale", "_shape"):
            a, b = tensors[f"q{name}"], tensors[f"{C}{name}"]
            if name == "":
                tensors["q"], tensors[C] = (*a[:1], [len(b[2])], b[2]), (*b[:1], [len(a[2])], a[2])

    rewrite_shard(folder, edit)


def _large_window(old):
    """The same codes in raw blocks after a header that asks for 16 MiB."""
    codes = zstandard.ZstdDecompressor().decompress(old)
    descriptor = bytes(
        [0b10_0_0_0_0_00, (24 - 10) << 3]
    )  # four bytes of content size, no single segment, window descriptor
    block = (1 | len(codes) << 3).to_bytes(3, "little") + codes
    return old[:4] + descriptor + len(codes).to_bytes(4, "little") + block


def _stored(name, change):
    """Changes dtype, shape and data of a stored tensor."""

    def edit(tensors):
        tensors[name] = change(tensors[name][2])

    return lambda folder: rewrite_shard(folder, edit)


def _header_without(name):
    return lambda folder: rewrite_shard(folder, lambda tensors: tensors.pop(name), fix_sides=False)


def _stored_more(folder):
    rewrite_shard(folder, lambda tensors: tensors.update(stowaway=("U8", [1], bytearray(1))))


FLAWS = {
    "header is an array": (_raw_text(lambda t: b"[" + t + b"]"), SchemaError, "begin with", None),
    "header begins with a space": (_raw_text(lambda t: b" " + t), SchemaError, "begin with", None),
    "header is cut": (_cut, TruncatedError, "inside its header", None),
    "header is not json": (
        _raw_text(lambda t: t.replace(b":", b";", 1)),
        SchemaError,
        "not JSON",
        None,
    ),
    "header with nan": (
        _raw_text(lambda t: t.replace(b'"shape": [9]', b'"shape": [NaN]')),
        SchemaError,
        "NaN",
        None,
    ),
    "name twice in the header": (
        _raw_text(lambda t: t.replace(b'"q_shape"', b'"n"')),
        SchemaError,
        "twice",
        None,
    ),
    "metadata is a list": (
        _header(lambda h: h.update(__metadata__=[])),
        SchemaError,
        "__metadata__",
        None,
    ),
    "metadata holds a number": (
        _header(lambda h: h.update(__metadata__={"a": 1})),
        SchemaError,
        "__metadata__",
        None,
    ),
    "entry with another key": (_entry("n", more=1), SchemaError, "dtype, shape", "n"),
    "entry without shape": (
        _header(lambda h: h["n"].pop("shape")),
        SchemaError,
        "dtype, shape",
        "n",
    ),
    "unknown dtype": (_entry("n", dtype="F99"), SchemaError, "dtype", "n"),
    "dtype is a number": (_entry("n", dtype=3), SchemaError, "dtype", "n"),
    "shape is a string": (_entry("n", shape="9"), SchemaError, "shape", "n"),
    "negative shape": (_entry("n", shape=[-9]), SchemaError, "shape", "n"),
    "boolean shape": (_entry("n", shape=[True]), SchemaError, "shape", "n"),
    "rank 9": (_entry("n", shape=[9] + [1] * 8), LimitError, "limits", "n"),
    "shape that overflows": (_entry("n", shape=[2**33, 2**31]), LimitError, "too large", "n"),
    "offsets are three": (_entry("n", data_offsets=[0, 1, 2]), SchemaError, "pair", "n"),
    "offsets are floats": (_entry("n", data_offsets=[0.0, 36.0]), SchemaError, "pair", "n"),
    "offsets backwards": (_entry("n", data_offsets=[36, 0]), LayoutError, "disagree", "n"),
    "offsets of another size": (_entry("n", shape=[8]), LayoutError, "disagree", "n"),
    "offsets overlap": (_entry("n", data_offsets=[0, 36]), LayoutError, "overlap", None),
    "offset beyond 2^53": (
        _entry("n", data_offsets=[2**60, 2**60 + 36]),
        LimitError,
        "too large",
        None,
    ),
    "hole": (lambda folder: put_shard(folder, *_with_hole(folder)), LayoutError, "follow", None),
    "empty name": (_header(lambda h: h.update({"": h.pop("n")})), SchemaError, "name", None),
    "name with newline": (
        _header(lambda h: h.update({"a\n": h.pop("n")})),
        SchemaError,
        "name",
        None,
    ),
    "table without magic": (_table(0, b"XXXX"), SchemaError, "magic", "q"),
    "table version 2": (_table(4, b"\2"), UnsupportedVersionError, "version", "q"),
    "table with 0 planes": (_table(5, b"\0"), LimitError, "planes", "q"),
    "table with 9 planes": (_table(5, b"\x09"), LimitError, "planes", "q"),
    "table with 2 planes": (_table(5, b"\2"), LayoutError, "wrong size", "q"),
    "table reserved bytes": (_table(6, b"\1"), SchemaError, "reserved", "q"),
    "table of other rows": (_table(8, b"\x17"), LayoutError, "disagree", "q"),
    "table of 2^63 rows": (_table(8, b"\0" * 7 + b"\x80"), LimitError, "too large", "q"),
    "table of 2^40 rows in tiles of one": (
        _table(8, (2**40).to_bytes(8, "little") + b"\1" + bytes(7) + b"\1\0\0\0" * 2),
        LayoutError,
        "wrong size",
        "q",
    ),
    "table with tiles of 0 rows": (_table(24, bytes(4)), LayoutError, "no extent", "q"),
    "table with chunks of 4 GiB": (
        _table(8, (2**20).to_bytes(8, "little") * 2 + b"\xff" * 8),
        LimitError,
        "chunk",
        "q",
    ),
    "table too short": (_resized_table(lambda t: t[:-1]), LayoutError, "wrong size", "q"),
    "table shorter than its header": (
        _resized_table(lambda t: t[:31]),
        LayoutError,
        "shorter",
        "q",
    ),
    "table with a record too many": (
        _resized_table(lambda t: t + bytes(16)),
        LayoutError,
        "wrong size",
        "q",
    ),
    "unknown codec id": (_table(36, b"\x07"), UnsupportedVersionError, "codec", "q"),
    "record reserved bytes": (_table(38, b"\1"), SchemaError, "reserved", "q"),
    "stored_bytes 0": (_table(32, bytes(4)), LayoutError, "stored_bytes", "q"),
    "stored_bytes 4 GiB": (_table(32, b"\xff" * 4), LayoutError, "stored_bytes", "q"),
    "stored_bytes one slot longer": (
        _table(32, (1920).to_bytes(4, "little")),
        LayoutError,
        "add up",
        "q",
    ),
    "codec raw for a frame": (
        _table(36, bytes([CODEC_IDS["raw"]])),
        LayoutError,
        "stored_bytes",
        "q",
    ),
    "padding is not zero": (_padding, SchemaError, "padding", "q"),
    "stored shape of another": (_shape, LayoutError, "shape", "l"),
    "frame of a wrong size": (_frame(_wrong_size), DecodeError, "wrong size", "q"),
    "frame that is a bomb": (_frame(_bomb), DecodeError, "wrong size", "q"),
    "frame of unknown size": (_frame(lambda old: _unsized(old)), DecodeError, "size", "q"),
    "two frames": (
        _frame(lambda old: old + zstandard.ZstdCompressor().compress(b"")),
        DecodeError,
        "unused data",
        "q",
    ),
    "skippable frame first": (
        _frame(lambda old: b"\x50\x2a\x4d\x18\0\0\0\0" + old),
        DecodeError,
        "not a Zstandard",
        "q",
    ),
    "frame with a dictionary": (_frame(_dictionary), DecodeError, "dictionary", "q"),
    "frame with a damaged block": (_frame(_damaged_frame), DecodeError, "corruption", "q"),
    "frame that is text": (
        _frame(lambda old: b"hello, world"),
        DecodeError,
        "not a Zstandard",
        "q",
    ),
    "code -128": (_frame(_codes(-128)), DecodeError, "-128", "q"),
    "scale nan": (_scale(np.nan), DecodeError, "scale", "q"),
    "scale infinite": (_scale(np.inf), DecodeError, "scale", "q"),
    "scale 0": (_scale(0.0), DecodeError, "scale", "q"),
    "scale negative": (_scale(-1.0), DecodeError, "scale", "q"),
    "scale that makes an infinity": (_scale(2.68e36), DecodeError, "scale", "q"),
    "scale subnormal": (_scale(1e-40), DecodeError, "scale", "q"),
    "frame with a window of 16 MiB": (_frame(_large_window), DecodeError, "window", "q"),
    "frame with a reserved bit": (
        _frame(lambda old: old[:4] + bytes([old[4] | 8]) + old[5:]),
        DecodeError,
        "Zstandard",
        "q",
    ),
    "frame that is cut": (_frame(lambda old: old[:-1]), DecodeError, "Zstandard", "q"),
    "payload of rank 2": (
        _stored("q", lambda d: ("U8", [1, len(d)], d)),
        LayoutError,
        "differs",
        "q",
    ),
    "payload of signed bytes": (
        _stored("q", lambda d: ("I8", [len(d)], d)),
        LayoutError,
        "differs",
        "q",
    ),
    "payload one slot longer": (
        _stored("q", lambda d: ("U8", [len(d) + 16], d + bytes(16))),
        LayoutError,
        "add up",
        "q",
    ),
    "payload empty": (
        _stored("q", lambda d: ("U8", [0], bytearray())),
        LayoutError,
        "too long for its payload",
        "q",
    ),
    "one scale more": (
        _stored("q_scale", lambda d: ("F32", [25], d + bytes(4))),
        LayoutError,
        "differs",
        "q_scale",
    ),
    "scales of integers": (
        _stored("q_scale", lambda d: ("I32", [24], d)),
        LayoutError,
        "differs",
        "q_scale",
    ),
    "scales of rank 2": (
        _stored("q_scale", lambda d: ("F32", [24, 1], d)),
        LayoutError,
        "differs",
        "q_scale",
    ),
    "shape of three": (
        _stored("q_shape", lambda d: ("I64", [3], d + bytes(8))),
        LayoutError,
        "differs",
        "q_shape",
    ),
    "shape negative": (
        _stored("q_shape", lambda d: ("I64", [2], d[:8] + b"\xff" * 8)),
        LayoutError,
        "shape",
        "q",
    ),
    "no scales": (_header_without("q_scale"), LayoutError, "lacks", "q_scale"),
    "no chunk table": (_header_without("l_chunks"), LayoutError, "lacks", "l_chunks"),
    "no payload": (_header_without("l"), LayoutError, "lacks", "l"),
    "a tensor more": (_stored_more, LayoutError, "does not place", "stowaway"),
    "payloads change places": (_swapped_chunks, LayoutError, "add up", "q"),
}


def _with_hole(folder):
    data = (folder / SHARD).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    return data[:size], data[size:] + b"\0"


def _unsized(old):
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return stream.compress(zstandard.ZstdDecompressor().decompress(old)) + stream.flush()


@pytest.mark.parametrize("name", FLAWS)
def test_flaw_has_its_error(folder, name):
    damage, expected, words, tensor = FLAWS[name]
    damage(folder)
    with pytest.raises(CodecLLMError) as caught:
        read_tensors(folder)
    assert type(caught.value) is expected, repr(caught.value)
    assert words in str(caught.value)
    assert caught.value.file == SHARD
    assert tensor is None or caught.value.tensor == tensor
    if expected is DecodeError and "scale" not in words:
        assert caught.value.chunk == 0
        assert caught.value.byte == tampering.payload_place(folder, tensor)[1]
    assert "\n" not in str(caught.value)


def test_window_larger_than_the_content_is_accepted(folder, pristine):
    """Any encoder may have made a frame.

    A window larger than the content is cut by the content's declared size.
    """
    _frame(_with_window)(folder)
    assert read_tensors(folder) == read_tensors(pristine)


def test_a_code_changed_by_an_attacker_changes_the_digest_only(folder, pristine):
    """Checksums inside a container cannot stop it: it decodes, and the tensor's digest tells."""
    from codecllm.formats.container import Container
    from codecllm.formats.reference import tensor_digest

    _frame(_codes(1))(folder)
    assert read_tensors(folder)["q"] != read_tensors(pristine)["q"]
    with Container(folder) as container:
        assert tensor_digest(container, "q") != container.records["q"].digest
