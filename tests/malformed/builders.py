"""A tiny valid container, and ways to change one thing in it while all checksums still fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codecllm.converter import ParamsChoice, convert
from codecllm.formats.checksums import sha256_hex, xxh3_hex
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.reference import read_tensor_bytes
from codecllm.formats.shards.chunk_table import RECORD
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES, TensorEntry, pack_header
from tests import tampering
from tests.sources import bf16, write_source
from tests.stepped import make_steps

SHARD = "model-00001-of-00001.safetensors"
Tensors = dict[str, tuple[str, list[int], bytearray]]


def make_container(base: Path) -> Path:
    """Makes a container of a few KiB.

    `l` lossless, `q` int8 by rows, `h.0.attn.c_attn.weight` int8 by columns, `n` plain.
    """
    rng = np.random.default_rng(1)
    tensors = {
        "l": ("BF16", bf16(rng.standard_normal((40, 64)))),
        "q": ("BF16", bf16(rng.standard_normal((24, 80)))),
        "h.0.attn.c_attn.weight": ("F32", (rng.standard_normal((40, 48)) ** 3).astype(np.float32)),
        "n": ("F32", np.linspace(0, 1, 9, dtype=np.float32)),
    }
    config = {"model_type": "gpt2", "architectures": ["GPT2Model"]}
    source = write_source(base / "source", tensors, config)
    convert(source, base / "container", include=("*",), exclude=("l",))
    return base / "container"


def make_flags_container(base: Path) -> Path:
    """Makes a container of one tensor, `flags`: booleans, lossless."""
    flags = np.arange(4320) % 7 == 0
    source = write_source(base / "source", {"flags": ("BOOL", flags.reshape(48, 90))})
    convert(source, base / "container", scheme="lossless")
    return base / "container"


def make_rans_container(base: Path) -> Path:
    """Makes a container of codec `rans`.

    `q` is int8, coded; `l` lossless with coded exponents and its other plane raw; `n` plain.
    """
    rng = np.random.default_rng(1)
    tensors = {
        "l": ("BF16", bf16(rng.standard_normal((40, 64)))),
        "q": ("F32", (rng.standard_normal((30, 80)) ** 3).astype(np.float32)),
        "n": ("F32", np.linspace(0, 1, 9, dtype=np.float32)),
    }
    source = write_source(base / "source", tensors, {"model_type": "none"})
    convert(source, base / "container", codec="rans", include=("*",), exclude=("l",))
    return base / "container"


def make_columns_container(base: Path) -> Path:
    """Makes a container whose columns have scales.

    `w` is wide, in one tile; `q` has column groups and scales of type BF16; `s` neither, in tiles;
    `h.0.attn.c_attn.weight` has its channels in columns.
    """
    rng = np.random.default_rng(1)
    values = rng.standard_normal((40, 64)).astype(np.float32)
    tensors = {
        "w": ("F32", values),
        "q": ("BF16", bf16(values)),
        "s": ("F32", values * 2),
        "h.0.attn.c_attn.weight": ("F32", values.T.copy()),
    }
    source = write_source(base / "source", tensors, {"model_type": "gpt2"})

    def provide(plan):
        name = plan.source.name
        steps = make_steps(plan, 0.012 if name == "w" else 0.2, short=name == "q")
        return steps if name != "s" else replace(steps, col_groups=None, tile=(20, 30))

    convert(source, base / "container", include=("*",), choice=ParamsChoice(provide))
    return base / "container"


def read_everything(folder: Path) -> dict[str, bytes]:
    """Reads a container as a careful reader does: every file's checksum, every tensor.

    Returns the tensors' bytes.
    """
    with Container(folder) as container:
        for record in (*container.manifest.files, *container.manifest.shards):
            container.check_file(record)
        return {name: read_tensor_bytes(container, name) for name in container.records}


def read_tensors(folder: Path) -> dict[str, bytes]:
    """Reads only the tensors, as a loader does that does not read whole files."""
    with Container(folder) as container:
        return {name: read_tensor_bytes(container, name) for name in container.records}


def split_shard(folder: Path) -> tuple[Tensors, dict[str, str]]:
    """Returns the tensors of the shard, in file order, and its metadata."""
    raw = (folder / SHARD).read_bytes()
    size = int.from_bytes(raw[:PREFIX_BYTES], "little")
    header = json.loads(raw[PREFIX_BYTES : PREFIX_BYTES + size])
    metadata = header.pop("__metadata__", {})
    base = PREFIX_BYTES + size
    tensors = {
        name: (
            entry["dtype"],
            entry["shape"],
            bytearray(raw[base + entry["data_offsets"][0] : base + entry["data_offsets"][1]]),
        )
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }
    return tensors, metadata


def rewrite_shard(folder: Path, edit: Callable[[Tensors], None], *, fix_sides: bool = True) -> None:
    """Edits the shard's tensors and makes all checksums of files and side tensors fit again."""
    tensors, metadata = split_shard(folder)
    edit(tensors)
    entries, position = [], 0
    for name, (dtype, shape, data) in tensors.items():
        entries.append(
            TensorEntry(name, DTYPES[dtype], tuple(shape), position, position + len(data))
        )
        position += len(data)
    head = pack_header(entries, metadata)
    put_shard(folder, head, b"".join(bytes(data) for _, _, data in tensors.values()))
    if fix_sides:
        tampering.reseal(folder, lambda document: fix_sides_of(document, tensors))


def put_shard(folder: Path, head: bytes, body: bytes) -> None:
    """Writes a shard of a header and data, and lets the manifest's shard record fit it."""
    (folder / SHARD).write_bytes(head + body)

    def edit(document: dict[str, Any]) -> None:
        document["shards"][0].update(
            bytes=len(head + body), sha256=sha256_hex(head + body), header_xxh3=xxh3_hex(head)
        )

    tampering.reseal(folder, edit)


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits the shard's header as JSON; the edit may return a text in its place."""
    raw = (folder / SHARD).read_bytes()
    size = int.from_bytes(raw[:PREFIX_BYTES], "little")
    header = json.loads(raw[PREFIX_BYTES : PREFIX_BYTES + size])
    text = edit(header)
    data = text if isinstance(text, bytes) else json.dumps(header).encode()
    put_shard(folder, len(data).to_bytes(8, "little") + data, raw[PREFIX_BYTES + size :])


def fix_chunks(tensors: Tensors, name: str) -> None:
    """Recomputes the chunk checksums of a tensor with one chunk per plane over its payload."""
    payload, table = tensors[name][2], tensors[name + "_chunks"][2]
    records = np.frombuffer(table, RECORD, offset=32).copy()
    position = 0
    for record in records:
        size = -(-int(record["stored_bytes"]) // 16) * 16
        record["xxh3"] = int(xxh3_hex(bytes(payload[position : position + size])), 16)
        position += size
    table[32:] = records.tobytes()


def fix_sides_of(document: dict[str, Any], tensors: Tensors) -> None:
    """Lets the checksums of side tensors and plain tensors in a manifest's JSON fit `tensors`."""
    for record in document["tensors"]:
        if record["scheme"] in ("int8", "lossless"):
            for side in record["xxh3"]:
                if f"{record['name']}_{side}" in tensors:
                    record["xxh3"][side] = xxh3_hex(bytes(tensors[f"{record['name']}_{side}"][2]))
        elif record["scheme"] == "raw" and record["name"] in tensors:
            record["xxh3"] = xxh3_hex(bytes(tensors[record["name"]][2]))
