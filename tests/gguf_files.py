"""GGUF files, written byte by byte, so that every number in them can be wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

U8, U32, F32, BOOL, TEXT, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
"""Types of fields."""


def text(value: str | bytes, length: int | None = None) -> bytes:
    """Returns a text with its length, or with another one."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def number(value: float, form: str = "I") -> bytes:
    """Returns a number in a letter of `struct`."""
    return struct.pack("<" + form, value)


def array(kind: int, items: list[bytes], count: int | None = None) -> bytes:
    """Returns an array of packed items, or of another count."""
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


@dataclass
class Gguf:
    """A GGUF file: fields (key, type, packed value) and tensors (name, shape, type, offset)."""

    fields: list[tuple[bytes, int, bytes]] = field(default_factory=list)
    tensors: list[tuple[bytes, list[int], int, int]] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    field_count: int | None = None

    def packed(self) -> bytes:
        """Returns the bytes of the file."""
        counts = (self.tensor_count, self.field_count)
        numbers = [
            len(rows) if count is None else count
            for rows, count in zip((self.tensors, self.fields), counts, strict=True)
        ]
        parts = [self.magic, struct.pack("<IQQ", self.version, *numbers)]
        parts += [text(key) + number(kind) + value for key, kind, value in self.fields]
        for name, shape, kind, offset in self.tensors:
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            parts.append(text(name) + dims + number(kind) + number(offset, "Q"))
        head = b"".join(parts)
        return head + bytes(-len(head) % 32) + self.data


def tiny_llama() -> Gguf:
    """Returns a Llama of one layer and 40 tokens, as llama.cpp would write it, in float32."""
    llama = {
        "context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
        "attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 32,
        "vocab_size": 40,
    }  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *(f"\u2581t{n}" for n in range(37))]
    fields = [(b"general.architecture", TEXT, text("llama"))]
    fields += [(f"llama.{key}".encode(), U32, number(value)) for key, value in llama.items()]
    fields += [
        (b"llama.attention.layer_norm_rms_epsilon", F32, number(1e-5, "f")),
        (b"tokenizer.ggml.model", TEXT, text("llama")),
        (b"tokenizer.ggml.tokens", ARRAY, array(TEXT, [text(token) for token in tokens])),
        (b"tokenizer.ggml.scores", ARRAY, array(F32, [number(-n, "f") for n in range(40)])),
        (b"tokenizer.ggml.token_type", ARRAY, array(5, [number(1, "i")] * 40)),
        (b"tokenizer.ggml.bos_token_id", U32, number(1)),
        (b"tokenizer.ggml.eos_token_id", U32, number(2)),
    ]
    shapes = {"token_embd": [64, 40], "output": [64, 40], "output_norm": [64]}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": [64, 64] for name in names}
    shapes |= {f"blk.0.{name}": [64] for name in ("attn_norm", "ffn_norm")}
    made, offset = Gguf(fields), 0
    for name, shape in shapes.items():
        made.tensors.append((f"{name}.weight".encode(), shape, 0, offset))
        offset += 4 * int(np.prod(shape))
    made.data = np.random.default_rng(0).standard_normal(offset // 4).astype("<f4").tobytes()
    return made
