"""Damaged and hostile GGUF files: one typed error, soon, before gguf or transformers read them."""

from __future__ import annotations

import random
from dataclasses import replace

import peft
import pytest
import torch

from codecllm.formats.errors import (
    CodecLLMError,
    LayoutError,
    LimitError,
    NotAContainerError,
    SchemaError,
    TruncatedError,
)
from codecllm.loader.hf.folder import read_gguf_tokenizer
from codecllm.loader.hf.gguf_header import check_gguf
from codecllm.loader.hf.plain import load_gguf
from codecllm.verifier.evaluation.candidates import find_candidate
from tests.gguf_files import ARRAY, BOOL, F32, TEXT, U8, U32, Gguf, array, number, text, tiny_llama
from tests.malformed.measure import measured

SEEDS, MUTATIONS, LOADS = 4, 1000, 30


def with_field(key, kind, value):
    """The tiny Llama with a field changed, or one more."""
    llama = tiny_llama()
    fields = [one for one in llama.fields if one[0] != key.encode()]
    return replace(llama, fields=[*fields, (key.encode(), kind, value)])


def with_tensor(**changes):
    """The tiny Llama with its first tensor changed."""
    llama = tiny_llama()
    name, shape, kind, offset = llama.tensors[0]
    first = {"name": name, "shape": shape, "kind": kind, "offset": offset} | changes
    llama.tensors[0] = tuple(first[part] for part in ("name", "shape", "kind", "offset"))
    return llama


HUGE = {
    f"{what}={value:#x}": (replace(tiny_llama(), **{what: value}), LimitError)
    for what in ("tensor_count", "field_count")
    for value in (1 << 20, 1 << 31, 1 << 63, (1 << 64) - 1)
}
LONG_TEXT = array(TEXT, [text("", 1 << 63)])
NESTED = array(ARRAY, [array(ARRAY, [array(ARRAY, [array(TEXT, [text("x")])])])])
CASES = HUGE | {
    "nothing": (b"", NotAContainerError),
    "magic": (replace(tiny_llama(), magic=b"GGML"), NotAContainerError),
    "version 1": (replace(tiny_llama(), version=1), NotAContainerError),
    "big-endian": (replace(tiny_llama(), version=3 << 24), NotAContainerError),
    "one field more": (replace(tiny_llama(), field_count=100), CodecLLMError),
    "one tensor more": (replace(tiny_llama(), tensor_count=100), CodecLLMError),
    "long key": (replace(tiny_llama(), fields=[(b"k" * 2000, U8, b"1")]), LimitError),
    "key is not UTF-8": (replace(tiny_llama(), fields=[(b"\xff", U8, b"1")]), SchemaError),
    "key twice": (replace(tiny_llama(), fields=tiny_llama().fields * 2), SchemaError),
    "text of 2^63": (with_field("x", TEXT, text("x", 1 << 63)), TruncatedError),
    "text of 2^64-1": (with_field("x", TEXT, text("x", (1 << 64) - 1)), TruncatedError),
    "unknown type": (with_field("x", 13, b""), SchemaError),
    "type of 2^32-1": (with_field("x", (1 << 32) - 1, b""), SchemaError),
    "array of texts, 2^62": (with_field("x", ARRAY, array(TEXT, [], 1 << 62)), LimitError),
    "array of numbers, 2^62": (with_field("x", ARRAY, array(F32, [], 1 << 62)), LimitError),
    "array of bytes, 2^21": (with_field("x", ARRAY, array(U8, [], 1 << 21)), TruncatedError),
    "array of arrays": (with_field("x", ARRAY, NESTED), SchemaError),
    "array of unknown": (with_field("x", ARRAY, array(99, [b"1"])), SchemaError),
    "array with a long text": (with_field("x", ARRAY, LONG_TEXT), TruncatedError),
    "alignment 0": (with_field("general.alignment", U32, number(0)), LayoutError),
    "alignment 3": (with_field("general.alignment", U32, number(3)), LayoutError),
    "alignment 2^31": (with_field("general.alignment", U32, number(1 << 31)), LayoutError),
    "alignment as text": (with_field("general.alignment", TEXT, text("32")), LayoutError),
    "alignment as bool": (with_field("general.alignment", BOOL, b"\1"), LayoutError),
    "tensor twice": (replace(tiny_llama(), tensors=tiny_llama().tensors * 2), SchemaError),
    "no dimension": (with_tensor(shape=[]), LayoutError),
    "five dimensions": (with_tensor(shape=[32, 1, 1, 1, 1]), LayoutError),
    "dimension 0": (with_tensor(shape=[0, 40]), LayoutError),
    "dimension 2^63": (with_tensor(shape=[1 << 63, 2]), TruncatedError),
    "product 2^64": (with_tensor(shape=[1 << 32, 1 << 32]), TruncatedError),
    "unknown type of a tensor": (with_tensor(kind=4), SchemaError),
    "type of a tensor 2^31": (with_tensor(kind=1 << 31), SchemaError),
    "half a block": (with_tensor(kind=8, shape=[33, 40]), LayoutError),
    "offset behind the end": (with_tensor(offset=1 << 40), TruncatedError),
    "offset 2^64-32": (with_tensor(offset=(1 << 64) - 32), TruncatedError),
    "offset is not aligned": (with_tensor(offset=1), LayoutError),
    "name of a tensor": (with_tensor(name=b"\xff\xfe"), SchemaError),
    "data end early": (replace(tiny_llama(), data=b""), TruncatedError),
    "a million layers": (with_field("llama.block_count", U32, number(10**6)), LimitError),
    "2^32-1 layers": (with_field("llama.block_count", U32, number((1 << 32) - 1)), LimitError),
    "a million experts": (with_field("llama.expert_count", U32, number(10**6)), LimitError),
    "width 2^31": (with_field("llama.embedding_length", U32, number(1 << 31)), LimitError),
    "wide": (with_field("llama.embedding_length", U32, number(1 << 20)), CodecLLMError),
    "no head": (with_field("llama.attention.head_count", U32, number(0)), CodecLLMError),
    "no such class": (with_field("general.architecture", TEXT, text("x" * 99)), CodecLLMError),
    "no field": (replace(tiny_llama(), fields=[]), CodecLLMError),
    "no tensor": (replace(tiny_llama(), tensors=[]), CodecLLMError),
}  # fmt: skip


def _load(path):
    """Everything that an evaluation reads of a GGUF file."""
    candidate = find_candidate(path)
    candidate.bits()
    model = candidate.load(torch.float32)
    return model, read_gguf_tokenizer(path)


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """Has everything imported and made once, so that a case costs its own time."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    path.write_bytes(tiny_llama().packed())
    return _load(path)


def test_a_sound_file_is_read(used, tmp_path):
    model, tokenizer = used
    assert model.get_input_embeddings().weight.shape == (40, 64)
    assert tokenizer("t1 t2")["input_ids"]
    (tmp_path / "m.gguf").write_bytes(tiny_llama().packed())
    header = check_gguf(tmp_path / "m.gguf")
    assert header.tensors["token_embd.weight"] == [64, 40]
    assert header.fields["general.architecture"] == "llama"
    assert header.fields["tokenizer.ggml.tokens"] is None


@pytest.mark.parametrize("name", CASES)
def test_what_a_file_may_not_hold(used, tmp_path, name):
    content, error = CASES[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content.packed() if isinstance(content, Gguf) else content)
    with measured() as cost, pytest.raises(error) as caught:
        _load(path)
    cost.check()
    assert "m.gguf" in str(caught.value)
    assert len(str(caught.value)) < 600


def _mutated(sound, rng):
    data = bytearray(sound)
    head = len(sound) - len(tiny_llama().data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(min(head, len(data)))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            edge = rng.choice((0, 1, 31, 32, 255, 1 << 16, 1 << 31, 1 << 62, 1 << 63, 2**64 - 1))
            data[at : at + 8] = edge.to_bytes(8, "little")
        elif kind == 2:
            del data[at:]
            data += b"G" * (not data)
        else:
            start = rng.randrange(head)
            data[at : at + 24] = sound[start : start + 24]
    return bytes(data)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_mutated_files_end_in_a_typed_error_or_are_read(used, tmp_path, seed):
    """Thousands of headers, and some whole loads of those that are sound."""
    rng, sound, path = random.Random(seed), tiny_llama().packed(), tmp_path / "m.gguf"
    loads, texts = 0, []
    with measured() as cost:
        for _ in range(MUTATIONS):
            path.write_bytes(_mutated(sound, rng))
            try:
                check_gguf(path)
            except CodecLLMError as exc:
                texts.append(str(exc))
                continue
            if loads < LOADS:
                loads += 1
                try:
                    _load(path)
                except CodecLLMError as exc:
                    texts.append(f"m.gguf: {exc}")
    assert len(texts) > MUTATIONS // 3
    assert all("m.gguf" in text and len(text) < 600 for text in texts)
    assert loads == LOADS
    assert cost.mib < 64


def test_nothing_beside_the_file_is_read(tmp_path):
    """An adapter would change the model, settings of a tokenizer its tokens."""
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_llama().packed())
    plain = load_gguf(path, torch.float32).state_dict()
    tokens = read_gguf_tokenizer(path)("t1 t2 t3")["input_ids"]
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    tuned = peft.get_peft_model(load_gguf(path, torch.float32), config)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    assert (tmp_path / "adapter_config.json").is_file()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Nothing"}')
    (tmp_path / "added_tokens.json").write_text('{"t1": 5, "t2": 6}')
    again = load_gguf(path, torch.float32).state_dict()
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    assert read_gguf_tokenizer(path)("t1 t2 t3")["input_ids"] == tokens
