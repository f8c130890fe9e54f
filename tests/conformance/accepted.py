"""Changes of a good container that leave it good: each is allowed by SPEC.md and rarely seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from codecllm.formats.checksums import sha256_hex
from codecllm.formats.container import Container
from codecllm.formats.manifest.manifest import INDEX_NAME
from codecllm.formats.reference import tensor_digest
from codecllm.formats.schemes.int8 import MAX_SCALE
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES
from tests import tampering
from tests.malformed import test_shard
from tests.malformed.builders import SHARD, put_shard, rewrite_shard

Q, C, N = 1, 2, 3


def _newer_minor(folder: Path) -> None:
    """A later minor version with keys of its own, features without use and in another order."""

    def edit(document: dict[str, Any]) -> None:
        document["x_note"] = {"any": ["thing", 1.5, None]}
        document.update(
            format_version="1.7",
            required_features=["wide", "steps", "rans", "steps"],
            writer={"another": "writer"},
        )

    tampering.reseal(folder, edit)
    (folder / "notes.txt").write_text("not listed, not read\n")


def _alias_first(folder: Path) -> None:
    """Aliases before and behind their tensor."""
    alias = {"dtype": "BF16", "shape": [40, 64], "scheme": "alias", "alias_of": "l"}

    def edit(document: dict[str, Any]) -> None:
        document["tensors"].insert(0, {"name": "before", **alias})
        document["tensors"].append({"name": "behind", **alias})

    tampering.reseal(folder, edit)


def _header_space(folder: Path) -> None:
    """White space in and behind the header's JSON, entries in another order, no metadata."""
    raw = (folder / SHARD).read_bytes()
    size = PREFIX_BYTES + int.from_bytes(raw[:PREFIX_BYTES], "little")
    header = json.loads(raw[PREFIX_BYTES:size])
    del header["__metadata__"]
    text = json.dumps(dict(reversed(header.items())), indent=1).encode() + b" \n\t \r\n"
    put_shard(folder, len(text).to_bytes(PREFIX_BYTES, "little") + text, raw[size:])


def _overflow(folder: Path) -> None:
    """The largest scales: products that are finite in float32 and infinite in BF16."""

    def edit(tensors: Any) -> None:
        scales = np.frombuffer(tensors["q_scale"][2], "<f4").copy()
        scales[::2] = MAX_SCALE
        scales[1::2] = np.float32(2.0**-126)
        tensors["q_scale"][2][:] = scales.tobytes()

    rewrite_shard(folder, edit)
    tampering.reseal(
        folder, lambda document: document["tensors"][Q].update(scale_range=[2.0**-126, MAX_SCALE])
    )
    with Container(folder) as container:
        digest = tensor_digest(container, "q")
    tampering.reseal(folder, lambda document: document["tensors"][Q].update(digest=digest))


def _symbols(frame: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(frame)


def _frame_with_checksum(frame: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=19, write_checksum=True).compress(_symbols(frame))


def _frame_of_raw_blocks(frame: bytes) -> bytes:
    """A window of 8 MiB, a Dictionary_ID field of value 0, and raw blocks of 1,000 bytes."""
    symbols = _symbols(frame)
    descriptor = bytes([0b10_0_0_0_0_01, (23 - 10) << 3, 0]) + len(symbols).to_bytes(4, "little")
    blocks = b""
    for start in range(0, len(symbols), 1000):
        block = symbols[start : start + 1000]
        last = start + 1000 >= len(symbols)
        blocks += (last | len(block) << 3).to_bytes(3, "little") + block
    return frame[:4] + descriptor + blocks


def _other_frames(folder: Path) -> None:
    """Frames of other encoders."""
    test_shard._frame(_frame_with_checksum, "q")(folder)
    test_shard._frame(_frame_of_raw_blocks, test_shard.C)(folder)


def _plain_values(folder: Path) -> None:
    """Plain tensors whose bytes are not interpreted: a boolean of 2, a tensor without elements."""

    def edit(tensors: Any) -> None:
        tensors["n"] = ("BOOL", [9], bytearray(range(9)))
        tensors["none"] = ("F32", [0, 5], bytearray())

    rewrite_shard(folder, edit)

    def records(document: dict[str, Any]) -> None:
        record = document["tensors"][N]
        record.update(dtype="BOOL", digest=sha256_hex(bytes(range(9))))
        empty = {**record, "name": "none", "dtype": "F32", "shape": [0, 5]}
        document["tensors"].append(empty | {"digest": sha256_hex(b""), "xxh3": "2d06800538d394c2"})

    tampering.reseal(folder, records)
    index = json.loads((folder / INDEX_NAME).read_bytes())
    index["weight_map"]["none"] = SHARD
    tampering.replace_listed(folder, INDEX_NAME, json.dumps(index).encode())
    tampering.reseal(folder, lambda document: _fix_plain(document, folder))


def _fix_plain(document: dict[str, Any], folder: Path) -> None:
    from codecllm.formats.checksums import xxh3_hex

    document["tensors"][N]["xxh3"] = xxh3_hex(bytes(range(9)))


def _nothing(folder: Path) -> None:
    """No tensor, no shard, no side file."""
    for path in folder.iterdir():
        if path.name != "codecllm.json":
            path.unlink()
    tampering.reseal(folder, lambda document: document.update(shards=[], files=[], tensors=[]))


CHANGES = {
    "newer-minor": _newer_minor,
    "alias-order": _alias_first,
    "header-space": _header_space,
    "overflow": _overflow,
    "other-frames": _other_frames,
    "plain-values": _plain_values,
    "nothing": _nothing,
}
