"""The examples of SPEC.md: `python -m tests.unit.formats.spec_example` prints them, `--write` puts them into SPEC.md."""

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
from codecllm.formats.shards.chunk_table import HEADER, RECORD
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES
from codecllm.formats.stored_tensor import StoredTensor
from tests.sources import write_source

SPEC = Path(__file__).resolve().parents[3] / "SPEC.md"


def example_weights() -> np.ndarray:
    """The tensor of Appendix A: float32 [4, 64]."""
    row, col = np.arange(4)[:, None], np.arange(64)[None, :]
    return (((7 * row + 3 * col) % 17 - 8) * 2.0**-6 * (1 + row)).astype(np.float32)


def hexdump() -> str:
    """Returns Appendix A's block: the shard in annotated hex, then the manifest."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_source(Path(folder) / "source", {"w": ("F32", example_weights())})
        convert(source, Path(folder) / "out", include=("*",))
        return _dump(Path(folder) / "out")


def vectors() -> str:
    """Returns Appendix B's block."""
    symbols = bytes([7]) * 64
    lines = []
    for codec_id, codec in CODECS.items():
        stored = bytes(codec.encode(symbols))
        slot = stored.ljust(-(-len(stored) // 16) * 16, b"\0")
        lines.append(
            f"codec {codec_id} ({codec.name}): stored_bytes {len(stored)}, xxh3 of the slot {xxh3_hex(slot)}"
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
        f"codec {RANS_ID} ({rans.NAME}): symbols 01020301 x 160, f[1] 2048, f[2] 1024, f[3] 1024, precision 12",
        f"  table {pack_table(table).hex()}",
        f"  stored_bytes {len(stored)}, xxh3 of the slot {xxh3_hex(stored)}",
        *(f"  stored {stored[start : start + 32].hex()}" for start in range(0, len(stored), 32)),
    ]


def embed(text: str) -> str:
    """Returns the text of SPEC.md with both blocks made anew."""
    for name, block in (("hexdump", hexdump()), ("vectors", vectors())):
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
    # The versions of what wrote it are the one thing in the example that changes from machine to machine.
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
        print(hexdump(), vectors(), sep="\n")
