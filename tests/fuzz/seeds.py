"""Writes the first inputs of the corpus.

`python -m tests.fuzz.seeds`. Findings are added by hand.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from codecllm.formats.codecs import ZSTD, rans_reference
from codecllm.formats.codecs.rans_fit import fit_table
from codecllm.formats.codecs.rans_table import pack_table
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.shards.safetensors_header import PREFIX_BYTES
from tests.malformed import builders

CORPUS = Path(__file__).parent / "corpus"


def seeds() -> dict[str, list[bytes]]:
    """Returns a few valid inputs of each target, and damaged ones."""
    with tempfile.TemporaryDirectory() as base:
        folder = builders.make_container(Path(base))
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
        tensors, _ = builders.split_shard(folder)
        weights = (Path(base) / "source" / "model.safetensors").read_bytes()
        settings = (Path(base) / "source" / "config.json").read_bytes()
    del document["manifest_sha256"]
    text = json.dumps(document).encode()
    size = int.from_bytes(weights[:PREFIX_BYTES], "little")
    header = weights[PREFIX_BYTES : PREFIX_BYTES + size]
    body = len(weights) - PREFIX_BYTES - size
    symbols = np.random.default_rng(0).binomial(40, 0.3, 300).astype(np.uint8)
    table = fit_table(np.bincount(symbols, minlength=256))
    packed = pack_table(table)
    coded = rans_reference.encode(symbols.tobytes(), table)
    few = b"\0\0\1\2" * 12
    small = fit_table(np.bincount(np.frombuffer(few, np.uint8), minlength=256))
    small_table, small_coded = pack_table(small), rans_reference.encode(few, small)
    sizes = len(symbols).to_bytes(2, "little"), len(packed).to_bytes(2, "little")
    frame = ZSTD.encode(symbols.tobytes())
    payload = len(tensors["q"][2]).to_bytes(4, "little")
    whole_source = len(settings).to_bytes(2, "little") + settings + weights[:4000]
    deep = b'{"a":' * 2000
    return {
        "manifest": [text, text.replace(b'"int8"', b'"raw"', 1), b"{" * 40, text[:300] + b"}"],
        "shard_header": [body.to_bytes(2, "little") + header, b"\0\0{}", b"\1\0" + header],
        "chunk_table": [payload + bytes(tensors["q_chunks"][2]), payload + bytes(48)],
        "codec_raw": [b"\3\0abc", b"\4\0abc"],
        "codec_zstd": [sizes[0] + frame, sizes[0] + frame[:-1], b"\1\0" + frame],
        "codec_rans": [
            b"".join((*sizes, packed, coded)),
            b"".join((*sizes, packed, coded[:-2])),
            b"".join((*sizes, packed, bytes(len(coded)))),
            bytes([len(few), 0, len(small_table), 0]) + small_table + small_coded,
        ],
        "container": [
            bytes(9),
            *(bytes([number]) + bytes(range(3, 67)) for number in range(4)),
            b"\1\1\0\0\xff\2\x10\0\0\4\x20\0\7",
        ],
        "source": [whole_source, whole_source[:200], b"\2\0{}" + weights[:600]],
        "config": [settings, b'{"num_hidden_layers":1e9}', deep, b'{"a_layers":[[9999999999]]}'],
    }


def main() -> None:
    """Writes the seeds."""
    for name, inputs in seeds().items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (CORPUS / name / f"seed-{number}").write_bytes(data)


if __name__ == "__main__":
    main()
