"""The examples of SPEC.md.

`python -m tests.unit.formats.spec_example` prints them, `--write` puts them into SPEC.md.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from codecllm.converter import convert
from codecllm.formats.checksums import sha256_hex, xxh3_hex
from codecllm.formats.codecs import CODECS, RANS_ID, rans, rans_reference
from codecllm.formats.codecs.rans_table import FrequencyTable, pack_table
from codecllm.formats.container import Container
from codecllm.formats.dtypes import DTYPES
from codecllm.formats.manifest.manifest import MANIFEST_NAME, pack_manifest
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.formats.schemes.columns import order_of
from codecllm.formats.schemes.float_bits import bits_from_float32
from codecllm.formats.schemes.int8 import dequantize, split_codes, step_sizes
from codecllm.formats.schemes.lossless import split_planes
from codecllm.formats.shards.chunk_table import HEADER, RECORD, slot_bytes
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES
from codecllm.formats.stored_tensor import StoredTensor
from codecllm.formats.tiling import Grid
from tests.sources import write_source
from tests.unit.formats.spec_rules import SPEC

WRITER = {"codecllm": "0.1.0", "numpy": "2.4.6", "zstandard": "0.25.0", "zstd": "1.5.7"}
"""Versions in the example's manifest: the part of it that changes from machine to machine."""


def example_weights() -> np.ndarray:
    """The tensor of Appendix A: float32 [4, 64]."""
    row, col = np.arange(4)[:, None], np.arange(64)[None, :]
    return (((7 * row + 3 * col) % 17 - 8) * 2.0**-6 * (1 + row)).astype(np.float32)


def make_example(folder: Path) -> Path:
    """Makes the container of Appendix A below `folder` and returns its path."""
    source = write_source(folder / "source", {"w": ("F32", example_weights())})
    convert(source, folder / "out", include=("*",))
    return folder / "out"


def hexdump() -> str:
    """Returns the shard of Appendix A in annotated hex."""
    with tempfile.TemporaryDirectory() as folder:
        return _dump(make_example(Path(folder)))


def manifest() -> str:
    """Returns the manifest of Appendix A, with the versions of `WRITER`."""
    with tempfile.TemporaryDirectory() as folder:
        data = (make_example(Path(folder)) / MANIFEST_NAME).read_bytes()
    parsed = parse_manifest(data).model_copy(update={"writer": WRITER})
    return f"```\n{pack_manifest(parsed).decode()}```"


def numbers() -> str:
    """Returns the vectors of Appendix B on numbers."""
    lines = ["lossless, BF16: element, plane 0, plane 1"]
    for word in (0xBF80, 0x3F80, 0x8000, 0x7F81):
        first, second = split_planes(np.array([word], np.uint16), DTYPES["BF16"])
        lines.append(f"  {word:04x}  {first[0]:02x} {second[0]:02x}")
    lines += ["", "order of products: code 13, X_scale 3dcccccd, X_col_scale 3e99999a"]
    step = step_sizes(_float32("3dcccccd"), _float32("3e99999a"))
    value = dequantize(np.array([[13]], np.int8), step)
    lines.append(f"  step {_hex(step)[0]}, x {_hex(value)[0]} (row first: 3ec7ae16)")
    lines += ["", "two roundings: code 66, step 3fc83e10, to BF16"]
    value = dequantize(np.array([66], np.int8), _float32("3fc83e10"))
    short = int(bits_from_float32(value, "BF16")[0])
    lines.append(f"  fl32 {_hex(value)[0]}, x {short:04x} (one rounding: 42cf)")
    lines += ["", "overflow: code 127, step 7c010203"]
    value = dequantize(np.array([127], np.int8), _float32("7c010203"))
    short = int(bits_from_float32(value, "BF16")[0])
    half = int(bits_from_float32(value, "F16")[0])
    lines.append(f"  F32 {_hex(value)[0]}, BF16 {short:04x}, F16 {half:04x}")
    return "```\n" + "\n".join([*lines, "", *_wide_vector()]) + "\n```"


def _wide_vector() -> list[str]:
    """Returns a wide tensor [2, 5] in tiles of [2, 2], all chunks of codec raw."""
    codes = np.array([[5, -300, 127, 9, -1], [-128, 3, 40, -32640, 32639]], np.int16)
    rows = _float32("3dcccccd 3e99999a")
    cols = _float32("3f333333 3f800000 3f666666 3f8ccccd 3e99999a")
    groups = np.array([1, 0, 1, 0, 0], np.uint8)
    order = order_of(groups)
    lines = [
        "wide, F32 [2, 5], channel_kind row, tile [2, 2], all chunks of codec raw",
        f"  X_scale {' '.join(_hex(rows))}",
        f"  X_col_scale {' '.join(_hex(cols))}",
        f"  X_col_group {groups.tobytes().hex(' ')}; order {' '.join(map(str, order))}",
        f"  codes in source order: {' '.join(map(str, codes[0]))}",
        f"                         {' '.join(map(str, codes[1]))}",
        "  chunks: plane, symbols, low_bits, xxh3 of the slot",
    ]
    stored = codes[:, order]
    grid = Grid(2, 5, 2, 2)
    for tile, low_bits in zip(grid, (8, 8, 3), strict=True):
        part = stored[:, tile.col : tile.col + tile.cols]
        for plane, half in enumerate(split_codes(part, low_bits)):
            symbols = half.tobytes()
            slot = symbols.ljust(slot_bytes(len(symbols)), b"\0")
            bits = low_bits if plane else 0
            lines.append(f"    {plane}  {symbols.hex():8}  {bits}  {xxh3_hex(slot)}")
    values = dequantize(codes, step_sizes(rows, cols))
    lines.append(f"  x {' '.join(_hex(values[0]))}")
    lines.append(f"    {' '.join(_hex(values[1]))}")
    digested = codes.astype("<i2").tobytes() + rows.tobytes() + cols.tobytes()
    return [*lines, f"  digest {sha256_hex(digested)}"]


def _float32(words: str) -> np.ndarray:
    return np.array([int(word, 16) for word in words.split()], np.uint32).view(np.float32)


def _hex(values: np.ndarray) -> list[str]:
    return [f"{word:08x}" for word in np.ascontiguousarray(values).view(np.uint32).reshape(-1)]


def vectors() -> str:
    """Returns Appendix B's block."""
    symbols = bytes([7]) * 64
    lines = []
    for codec_id, codec in CODECS.items():
        stored = bytes(codec.encode(symbols))
        slot = stored.ljust(-(-len(stored) // 16) * 16, b"\0")
        lines.append(
            f"codec {codec_id} ({codec.name}): stored_bytes {len(stored)}, "
            f"xxh3 of the slot {xxh3_hex(slot)}"
        )
        lines.append(f"  stored {stored.hex()}" if codec_id else "  stored 07 x 64")
    lines.append(f"sha256 of the symbols {sha256_hex(symbols)}")
    return "```\n" + "\n".join([*lines, *_rans_vector()]) + "\n```"


def _rans_vector() -> list[str]:
    table = FrequencyTable(12, np.zeros(256, np.int64))
    table.frequencies[[1, 2, 3]] = 2048, 1024, 1024
    symbols = bytes([1, 2, 3, 1]) * 160
    stored = rans_reference.encode(symbols, table)
    return [
        "",
        f"codec {RANS_ID} ({rans.NAME}): symbols 01020301 x 160, f[1] 2048, f[2] 1024, "
        "f[3] 1024, precision 12",
        f"  table {pack_table(table).hex()}",
        f"  stored_bytes {len(stored)}, xxh3 of the slot {xxh3_hex(stored)}",
        *(f"  stored {stored[start : start + 32].hex()}" for start in range(0, len(stored), 32)),
    ]


def embed(text: str) -> str:
    """Returns the text of SPEC.md with all blocks made anew."""
    blocks = {
        "manifest": manifest(),
        "hexdump": hexdump(),
        "vectors": vectors(),
        "numbers": numbers(),
    }
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, rest = text.split(begin)
        text = head + begin + "\n" + block + "\n" + end + rest.split(end)[1]
    return text


def _dump(folder: Path) -> str:
    path = next(folder.glob("*.safetensors"))
    data = path.read_bytes()
    header = PREFIX_BYTES + int.from_bytes(data[:PREFIX_BYTES], "little")
    with Container(folder) as container:
        tensor = container.tensor("w")
        assert isinstance(tensor, StoredTensor)
        entries = container.shard(0)[1].tensors
        stored = int(tensor.table.records[0]["stored_bytes"])
    lines = _part(data, 0, PREFIX_BYTES, "header_bytes")
    lines += _part(data, PREFIX_BYTES, header, "header: JSON, padded with spaces")
    for name, entry in entries.items():
        if name == "w":
            lines += _part(
                data,
                entry.start,
                entry.start + stored,
                "w: payload, chunk 0: one frame of 256 codes",
            )
            lines += (
                _part(data, entry.start + stored, entry.end, "w: padding of the slot")
                if stored % 16
                else []
            )
        elif name == "w_chunks":
            lines += _part(
                data, entry.start, entry.start + HEADER.itemsize, "w_chunks: header of the table"
            )
            for record in range(entry.start + HEADER.itemsize, entry.end, RECORD.itemsize):
                lines += _part(
                    data,
                    record,
                    record + RECORD.itemsize,
                    "w_chunks: record (stored_bytes, codec, low_bits, 0, xxh3)",
                )
        else:
            words = {"w_scale": "w_scale: four float32", "w_shape": "w_shape: two int64"}[name]
            lines += _part(data, entry.start, entry.end, words)
    return "```\n" + "\n".join(lines) + "\n```"


def _part(data: bytes, start: int, end: int, words: str) -> list[str]:
    lines = [f"# {words}"]
    for place in range(start, end, 16):
        piece = data[place : min(place + 16, end)]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
        lines.append(f"{place:04x}  {piece.hex(' '):<47}  {text}")
    return lines


if __name__ == "__main__":
    if "--write" in sys.argv:
        SPEC.write_text(embed(SPEC.read_text()))
    else:
        print(manifest(), hexdump(), vectors(), numbers(), sep="\n")
