"""Small side files that ask for something large: refused at once, or without effect."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CTRLConfig,
    CTRLLMHeadModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from codecllm.converter import convert
from codecllm.formats.errors import LimitError, ModelMismatchError, SchemaError, UsageError
from codecllm.generation import _greedy, generate
from codecllm.loader import from_pretrained
from codecllm.loader.config_size import check_config_size
from codecllm.loader.hf.folder import (
    read_config,
    read_generation_config,
    read_tokenizer,
)
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.hf.quantizer import register
from tests.malformed.measure import measured
from tests.tampering import add_listed, copy_of, replace_listed

PROMPT = "w1 w2 w3"


def _changed(container, folder, file, **changes):
    """Returns a copy of a container, with values of one JSON file changed."""
    copy_of(container, folder)
    path = folder / file
    listed = path.is_file()
    document = json.loads(path.read_bytes()) if listed else {}
    data = json.dumps(document | changes).encode()
    (replace_listed if listed else add_listed)(folder, file, data)
    return folder


def _refusal(error, call, *arguments):
    """Returns the text of an error that comes in a few seconds of this thread."""
    began = time.thread_time()
    with pytest.raises(error) as caught:
        call(*arguments)
    assert time.thread_time() - began < 5
    return str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_labels": 10**8},
        {"sub_config": {"num_labels": 10**12}},
        {"pruned_heads": {str(number): [0] for number in range(100_000)}},
        {"layer_types": ["full_attention"] * 100_000},
        {"merger_times": 100_000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_asks_for_no_more_than_the_container_has(container, tmp_path, change):
    folder = _changed(container, tmp_path / "c", "config.json", **change)
    text = _refusal(ModelMismatchError, from_pretrained, folder)
    assert text.startswith(f"config.json: {next(iter(change))}")
    assert "expected at most 4096" in text


@pytest.mark.parametrize("load", [from_pretrained, AutoModel.from_pretrained, load_plain])
def test_nor_for_a_table_of_positions_that_is_no_parameter(tmp_path, load):
    """CTRL makes one for each position that its config states, as a buffer."""
    config = CTRLConfig(vocab_size=300, n_positions=64, n_embd=64, dff=64, n_layer=2, n_head=4)
    source, folder = tmp_path / "source", tmp_path / "c"
    CTRLLMHeadModel(config).save_pretrained(source)
    convert(source, folder)
    changed = json.dumps(json.loads((folder / "config.json").read_bytes()) | {"n_positions": 10**9})
    replace_listed(folder, "config.json", changed.encode())
    (source / "config.json").write_text(changed.replace('"quantization_config"', '"x"'))
    text = _refusal(ModelMismatchError, load, source if load is load_plain else folder)
    assert "got buffers of 64000000000 elements" in text


ENDLESS: dict[str, object] = {}
ENDLESS["text_config"] = ENDLESS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_labels": 10**30}, "num_labels is more .* got 1000"),
        ({"num_labels": 10**5000}, "got a number of 16610 bits"),
        ({"num_labels": np.int64(10**12)}, "num_labels is more"),
        ({"num_labels": torch.tensor(10**12)}, "num_labels is more"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers describes more"),
        ({"text_config": {"num_hidden_layers": 10**9}}, r"text_config.num_hidden_layers describes"),
        ({"layer_types": ("full_attention",) * 10_000}, "layer_types describes more"),
        ({"pruned_heads": {n: [0] for n in range(10_000)}}, "pruned_heads describes more"),
        ({"id2label": {n: str(n) for n in range(200_000)}}, "id2label has too many items"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_neither_does_an_argument(container, arguments, words):
    for auto_class in (None, AutoModelForSequenceClassification):
        with pytest.raises((ModelMismatchError, LimitError), match=words) as caught:
            from_pretrained(container, auto_class=auto_class, **arguments)
        assert str(caught.value).startswith("an argument asks for too much: ")


def test_arguments_without_an_end(container):
    assert "nested too deeply" in _refusal(
        UsageError, lambda: from_pretrained(container, text_config=ENDLESS)
    )


def test_nor_a_config_of_the_caller(container):
    config = LlamaConfig.from_pretrained(container)
    config.num_hidden_layers = 10**8
    text = _refusal(ModelMismatchError, lambda: from_pretrained(container, config=config))
    assert "num_hidden_layers describes more modules" in text
    assert "arguments of this call changed the config: config" in text


def test_labels_that_a_caller_asks_for(container):
    classifier = AutoModelForSequenceClassification
    model = from_pretrained(container, auto_class=classifier, num_labels=4096)
    assert model.score.weight.shape[0] == 4096


def test_nor_an_argument_of_a_class_of_transformers(container):
    register()
    for change in ({"num_labels": 10**30}, {"num_hidden_layers": 10**9}):
        assert "at most" in _refusal(
            ModelMismatchError, lambda change=change: AutoModel.from_pretrained(container, **change)
        )


@pytest.mark.parametrize("call", [read_config, read_tokenizer])
def test_no_reader_of_a_model_makes_a_hundred_million_labels(container, tmp_path, call):
    folder = _changed(container, tmp_path / "c", "config.json", num_labels=10**8)
    assert "num_labels" in _refusal(ModelMismatchError, call, folder)
    (folder / "codecllm.json").unlink()  # a plain model
    assert "num_labels" in _refusal(ModelMismatchError, call, folder)


@pytest.mark.parametrize("reader", [AutoConfig, AutoModel, AutoTokenizer, LlamaForCausalLM])
@pytest.mark.parametrize("change", [{"num_labels": 10**8}, {"num_hidden_layers": 10**8}], ids=str)
def test_classes_of_transformers_ask_for_no_more_either(container, tmp_path, reader, change):
    """The config's class would make the labels before our quantizer is asked for anything."""
    register()
    folder = _changed(container, tmp_path / "c", "config.json", **change)
    (folder / "tokenizer_config.json").unlink()  # its class is then that of the config
    assert "at most" in _refusal(ModelMismatchError, reader.from_pretrained, folder)


def test_lists_of_a_config_have_a_limit():
    assert "a.b has too many items" in _refusal(
        LimitError, check_config_size, {"a": {"b": [0] * 200_000}}, 10
    )


def test_labels_of_real_heads_pass(container, tmp_path):
    check_config_size({"num_labels": 21_841}, 10, longest=21_841)
    names = {str(number): f"layer {number}" for number in range(21_841)}
    numbers = {name: int(number) for number, name in names.items()}
    check_config_size({"num_labels": 21_841, "id2label": names, "label2id": numbers}, 10)
    with pytest.raises(ModelMismatchError, match="got 21842"):
        check_config_size({"num_labels": 21_842, "id2label": names}, 10, longest=21_841)
    folder = _changed(container, tmp_path / "c", "config.json", num_labels=1000)
    assert from_pretrained(folder).config.num_labels == 1000


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 10**8}),
        ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 10**8}),
        ("tokenizer_config.json", {"tokenizer_class": "PegasusTokenizer", "offset": 10**8}),
        ("tokenizer_config.json", {"tokenizer_class": "XGLMTokenizer", "num_madeup_words": 10**8}),
        ("tokenizer_config.json", {"extra_special_tokens": [f"<{n}>" for n in range(50_000)]}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<a>"] * 50_000}),
        ("added_tokens.json", {f"<{number}>": number for number in range(70_000)}),
        (
            "tokenizer.json",
            {"added_tokens": [{"id": n, "content": f"<{n}>"} for n in range(33_000)]},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else next(reversed(value)),
)
def test_a_tokenizer_asks_for_no_more_tokens_than_any_has(container, tmp_path, file, change):
    folder = _changed(container, tmp_path / "c", file, **change)
    text = _refusal(LimitError, read_tokenizer, folder)
    assert text.startswith(f"{file}: ")
    assert "expected at most" in text


LONG = {
    "config.json": (read_config, 6_000_000),
    "generation_config.json": (read_generation_config, 6_000_000),
    "tokenizer_config.json": (read_tokenizer, 6_000_000),
    "added_tokens.json": (read_tokenizer, 600_000),
    "tokenizer.json": (read_tokenizer, 9_000_000),
    "vocab.json": (read_tokenizer, 9_000_000),
}


@pytest.mark.parametrize("file", LONG)
def test_a_file_of_lists_is_not_parsed(container, tmp_path, file):
    read, count = LONG[file]
    folder = copy_of(container, tmp_path / "c")
    data = b'{"a":[' + b"[]," * count + b"[]]}"
    (replace_listed if (folder / file).is_file() else add_listed)(folder, file, data)
    with measured() as cost, pytest.raises(LimitError, match=rf"^{file}: JSON text is too long"):
        read(folder)
    cost.check(len(data) / 2**20)


def test_a_tokenizer_of_thousands_of_added_tokens_is_read(container, tmp_path):
    names = [f"<image_{number}>" for number in range(3000)]
    settings = {"content": "", "special": True, "normalized": False} | dict.fromkeys(
        ("lstrip", "rstrip", "single_word"), False
    )
    added = {str(61 + n): settings | {"content": f"<audio_{n}>"} for n in range(3000)}
    folder = _changed(
        container,
        tmp_path / "c",
        "tokenizer_config.json",
        extra_special_tokens=names,
        added_tokens_decoder=added,
    )
    tokenizer = read_tokenizer(folder)
    assert len({*tokenizer(" ".join(names))["input_ids"]}) == 3000


GENERATION = {
    "num_beams": {"num_beams": 10**6},
    "num_return_sequences": {"num_return_sequences": 10**5, "num_beams": 10**5},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "constraints": {"constraints": [1]},
    "force_words_ids": {"force_words_ids": [[1]], "num_beams": 2},
    "quantized cache": {
        "cache_implementation": "quantized", "cache_config": {"backend": "quanto"},
    },
    "stop_strings": {"stop_strings": ["a"]},
    "max_time": {"max_time": "x"},
    "prefill_chunk_size": {"prefill_chunk_size": -1},
    "token_healing": {"token_healing": True},
    "is_assistant": {"is_assistant": True, "num_assistant_tokens": 10**9},
    "return_dict": {"return_dict_in_generate": True, "output_scores": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_text(container):
    """What the container says without generation defaults."""
    return generate(container, PROMPT, max_new_tokens=4)


@pytest.mark.parametrize("name", GENERATION)
def test_generate_is_greedy_whatever_the_defaults_are(container, tmp_path, plain_text, name):
    folder = _changed(container, tmp_path / "c", "generation_config.json", **GENERATION[name])
    assert generate(folder, PROMPT, max_new_tokens=4) == plain_text


def test_generate_keeps_the_token_ids_of_the_defaults():
    own = GenerationConfig(eos_token_id=[5, 7], bos_token_id=1, num_beams=9, min_length=99)
    plain = _greedy(own, SimpleNamespace(eos_token_id=3), 61, 4)
    assert (plain.eos_token_id, plain.bos_token_id, plain.pad_token_id) == ([5, 7], 1, 3)
    assert (plain.max_new_tokens, plain.do_sample) == (4, False)
    assert plain.num_beams in (None, 1)
    assert not plain.min_length


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", ["a"]),
        ("eos_token_id", list(range(1000))),
        ("bos_token_id", 2**40),
        ("forced_bos_token_id", 10**6),
        ("decoder_start_token_id", {"a": 1}),
    ],
)
def test_generate_refuses_what_is_no_token(container, tmp_path, key, value):
    folder = _changed(container, tmp_path / "c", "generation_config.json", **{key: value})
    with pytest.raises(SchemaError, match=rf"generation_config\.json: {key} is no token id"):
        generate(folder, PROMPT, max_new_tokens=4)
