"""A tokenizer that makes a text far longer is refused before it is read or the model runs."""

from __future__ import annotations

import base64
import json
import random
import time
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer

from codecllm.formats.errors import LimitError, SchemaError
from codecllm.generation import generate
from codecllm.loader.hf.folder import read_tokenizer
from codecllm.loader.hf.tokenizer_growth import (
    _BEHIND,
    _OF_PIECES,
    _OF_TEXTS,
    _OF_TOKENS,
    check_growth,
    growth_of_decoded,
    growth_of_pieces,
    growth_of_text,
)
from tests.tampering import copy_of, replace_listed


def _replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _sequence(*steps, of="normalizers"):
    return {"type": "Sequence", of: list(steps)}


def _map(*texts):
    data = (4).to_bytes(4, "little") + bytes(4) + b"".join(t.encode() + b"\0" for t in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def _template(*pieces, ids=1):
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * pieces[0]
        + [{"Sequence": {"id": "A", "type_id": 0}}] * pieces[1],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}},
    }


TWENTY = _replace("a", "a" * 20)
ANY = _replace("b*", "a" * 20, "Regex")
PIECES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
PRE, OF = {"of": "pretokenizers"}, {"of": "decoders"}
BOMBS = {
    "a chain": {"normalizer": _sequence(*[TWENTY] * 6)},
    "a chain of sequences": {"normalizer": _sequence(_sequence(_sequence(TWENTY)), TWENTY)},
    "one long text": {"normalizer": _replace("a", "b" * 65)},
    "a compatibility form": {
        "normalizer": _sequence(_replace("a", "\ufdfa" * 4), {"type": "NFKC"})
    },
    "matches of nothing": {"normalizer": _sequence(ANY, ANY)},
    "an empty pattern": {"normalizer": _replace("", "a" * 64)},
    "a pattern that looks ahead": {"normalizer": _sequence(*[_replace("(?=a)", "a", "Regex")] * 7)},
    "bytes of bytes": {"normalizer": _sequence(*[{"type": "ByteLevel"}] * 6)},
    "a map": {"normalizer": _map("a", "b" * 65)},
    "a long map": {"normalizer": _map("a" * (1 << 20))},
    "a long beginning": {"normalizer": {"type": "Prepend", "prepend": "a" * 4097}},
    "a beginning that grows": {
        "normalizer": _sequence({"type": "Prepend", "prepend": "a" * 2000}, _replace("a", "aaa"))
    },
    "a chain that cannot grow, too long": {"normalizer": _sequence(*[_replace("a", "b")] * 2000)},
    "a decoder": {"decoder": _sequence(*[TWENTY] * 6, of="decoders")},
    "pieces of bytes": {"pre_tokenizer": _sequence(*[PIECES] * 4, of="pretokenizers")},
    "pieces with a mark": {
        "pre_tokenizer": _sequence(*[{"type": "Metaspace", "replacement": "_"}] * 7, **PRE)
    },
    "texts and pieces": {
        "normalizer": TWENTY,
        "pre_tokenizer": _sequence(PIECES, PIECES, **PRE),
    },
    "a suffix of nothing": {
        "decoder": _sequence(*[{"type": "BPEDecoder", "suffix": ""}] * 4, **OF)
    },
    "a delimiter of nothing": {
        "decoder": _sequence(*[{"type": "CTC", "word_delimiter_token": ""}] * 4, **OF)
    },
    "spaces before tokens": {
        "decoder": _sequence(*([{"type": "WordPiece", "prefix": "-"}] * 70 + [TWENTY] * 2), **OF)
    },
    "special tokens": {"post_processor": _template(100_000, 1, ids=50)},
    "copies": {"post_processor": _template(0, 3)},
    "copies of copies": {"post_processor": _sequence(*[_template(0, 2)] * 9, of="processors")},
}

SOUND = {
    "none": {"normalizer": None, "post_processor": None, "decoder": None},
    "of another type": {"post_processor": _template(1, 1) | {"single": 5, "special_tokens": [2]}},
    "GPT-2": {"pre_tokenizer": PIECES, "decoder": PIECES, "post_processor": PIECES},
    "marks and bytes": {
        "pre_tokenizer": _sequence(
            *({"type": "Digits"}, {"type": "Split"}, PIECES),
            {"type": "Metaspace", "replacement": "\u2581"},
            **PRE,
        )
    },
    "a map and a mark": {
        "normalizer": _map("a", "\ufdfa"),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581"},
    },
    "CTC": {"decoder": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|"}},
    "CLIP's words": {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}},
    "BERT's words": {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
    "Llama": {
        "normalizer": _sequence({"type": "Prepend", "prepend": "\u2581"}, _replace(" ", "\u2581")),
        "decoder": _sequence(_replace("\u2581", " "), {"type": "Fuse"}, of="decoders"),
    },
    "CLIP": {"normalizer": _sequence({"type": "NFC"}, _replace("\\s+", " ", "Regex"))},
    "BERT": {"normalizer": {"type": "BertNormalizer"}, "post_processor": _template(2, 1)},
    "ALBERT": {
        "normalizer": _sequence(
            *(_replace("``", '"'), _replace("''", '"')),
            *({"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}),
            *(_map("a", "\ufdfa"), _replace(" {2,}", " ", "Regex")),
        )
    },
    "text that is no map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_grows_is_refused(name):
    began = time.thread_time()
    with pytest.raises(LimitError, match=r"far longer|too many steps"):
        check_growth(BOMBS[name], "tokenizer.json")
    assert time.thread_time() - began < 1


@pytest.mark.parametrize(
    "document",
    [
        {"normalizer": {"pattern": {"String": "a"}, "content": "a" * 99}},
        {"normalizer": [["a" * 99]]},
        {"normalizer": _sequence(["a" * 99])},
        {"normalizer": {"normalizers": [TWENTY]}},
        {"normalizer": {"type": ["Replace"]}},
        {"pre_tokenizer": {"type": "Repeat"}},
        {"pre_tokenizer": "ByteLevel"},
        {"decoder": {"suffix": ""}},
        {"decoder": _sequence({"suffix": ""}, of="decoders")},
        {"post_processor": {"single": [], "pair": [], "special_tokens": {}}},
    ],
    ids=str,
)
def test_steps_of_no_known_type_are_refused(document):
    """Of the first, tokenizers makes a Replace."""
    with pytest.raises(SchemaError, match="has a step of no known type"):
        check_growth(document, "tokenizer.json")


def test_all_types_of_tokenizers_are_known():
    """Guards the test above: those of a new version need a look at how they grow."""
    for module, kinds in (
        (normalizers, _OF_TEXTS),
        (pre_tokenizers, _OF_PIECES),
        (decoders, _OF_TOKENS),
        (processors, _BEHIND),
    ):
        bases = {"Normalizer", "PreTokenizer", "Decoder", "DecodeStream", "PostProcessor"}
        names = {name for name, value in vars(module).items() if isinstance(value, type)}
        assert names - bases == set(kinds)


@pytest.mark.parametrize("name", SOUND)
def test_what_tokenizers_have_passes(name):
    check_growth(SOUND[name], "tokenizer.json")


@pytest.mark.parametrize("name", ["a chain", "a decoder", "special tokens"])
def test_generate_and_readers_refuse_it(container, tmp_path, name):
    folder = copy_of(container, tmp_path / "c")
    path = folder / "tokenizer.json"
    replace_listed(
        folder, path.name, json.dumps(json.loads(path.read_text()) | BOMBS[name]).encode()
    )
    for call in (lambda: generate(folder, "a banana"), lambda: read_tokenizer(folder)):
        with pytest.raises(LimitError, match="far longer") as caught:
            call()
        assert caught.value.file == "tokenizer.json"


def test_generate_gives_a_model_no_more_tokens_than_a_text_can_have(container, tmp_path):
    """Below the bound of a tokenizer, 30 tokens a letter are beyond that of a prompt."""
    folder = copy_of(container, tmp_path / "c")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["normalizer"] = _replace("a", " w" * 30)
    replace_listed(folder, "tokenizer.json", json.dumps(document).encode())
    assert len(read_tokenizer(folder)("aa")["input_ids"]) == 60
    with pytest.raises(LimitError, match=r"too many tokens of the prompt, got 30000, .* 20096"):
        generate(folder, "a" * 1000, max_new_tokens=1)


def test_other_versions_of_the_file_are_checked(container, tmp_path):
    data = (container / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data)
    document = json.loads(data) | BOMBS["a chain"]
    (tmp_path / "tokenizer.4.0.0.json").write_text(json.dumps(document))
    with pytest.raises(LimitError, match="far longer") as caught:
        read_tokenizer(tmp_path)
    assert caught.value.file == "tokenizer.4.0.0.json"


STEPS = [
    *(
        _replace(one, two)
        for one in ("a", "ab", "\ufdfa", "\u0130")
        for two in ("", "ba", "\ufdfaa")
    ),
    *(_replace(one, "ab", "Regex") for one in ("a+", "[ab]", "b{2,}", "a*", "(?=a)", "\\b", "a|")),
    *({"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")),
    *({"type": kind} for kind in ("Nmt", "ByteLevel")),
    {"type": "Prepend", "prepend": "a\ufdfa"},
    {
        "type": "BertNormalizer",
        **dict.fromkeys(("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"), True),
    },
    {"type": "Strip", "strip_left": True, "strip_right": True},
]


def test_no_text_grows_beyond_what_is_computed():
    """Chains of tokenizers' own steps on texts of characters that grow."""
    draw, measured, most = random.Random(0), 0, 0.0
    for _ in range(2000):
        steps = draw.choices(STEPS, k=draw.randint(1, 4))
        text = "".join(draw.choices("aab \u00e9\u0130\u01c4\u4e2d\ufdfa\u00bc\U0001d160", k=9))
        factor, added = 1.0, 0.0
        for step in steps:
            times, more = growth_of_text(step)
            factor, added = factor * times, added * times + more
        try:
            longer = _normalizer(_sequence(*steps)).normalize_str(text)
        except BaseException as exc:
            if type(exc).__name__ != "PanicException":  # of a few chains, in tokenizers 0.23
                raise
            continue
        before, after = (len(unicodedata.normalize("NFKD", one)) for one in (text, longer))
        assert after <= factor * before + added, steps
        measured, most = measured + 1, max(most, after / before)
    assert measured > 1500
    assert most > 4


SPLITS = [
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
    *({"type": "FixedLength", "length": 1}, {"type": "Punctuation", "behavior": "Isolated"}),
    *({"type": "Digits", "individual_digits": True}, {"type": "BertPreTokenizer"}),
    *({"type": "UnicodeScripts"}, {"type": "Whitespace"}, {"type": "WhitespaceSplit"}),
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    *(
        PIECES | {"add_prefix_space": space, "use_regex": regex}
        for space in (True, False)
        for regex in (True, False)
    ),
    *(
        {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": True}
        for mark in "_\u2581"
        for scheme in ("always", "first", "never")
    ),
]
WORDS = [
    *({"type": "BPEDecoder", "suffix": suffix} for suffix in ("", "a")),
    *({"type": "WordPiece", "prefix": prefix, "cleanup": True} for prefix in ("", "##", "a")),
    *(
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": mark, "cleanup": True}
        for mark in ("", "|")
    ),
    *({"type": kind} for kind in ("ByteFallback", "Fuse")),
    PIECES,
    {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
    *(_replace("a", "bb"), {"type": "Strip", "content": "a", "start": 1, "stop": 1}),
]


@pytest.mark.parametrize("of", ["pretokenizers", "decoders"])
def test_no_pieces_grow_beyond_what_is_computed(of):
    draw, measured, most = random.Random(0), 0, 0.0
    is_decoder = of == "decoders"
    for _ in range(2000):
        steps = draw.choices(WORDS if is_decoder else SPLITS, k=draw.randint(1, 4))
        text = "".join(draw.choices("aab \u00e9\u0130|_\u4e2d1\U0001d160", k=9))
        factor, added = 1.0, 0.0
        for step in steps:
            times, more = (growth_of_decoded if is_decoder else growth_of_pieces)(step)
            factor, added = factor * times, added * times + more
        whole = _tokenizer(_sequence(*steps, of=of), "decoder" if is_decoder else "pre_tokenizer")
        if is_decoder:
            tokens = [text[at : at + 3] for at in range(0, 9, 3)]
            added *= len(tokens)
            try:
                longer = whole.decoder.decode(tokens)
            except BaseException as exc:
                if type(exc).__name__ != "PanicException":  # of Strip, in tokenizers 0.23
                    raise
                continue
            before, after = (len(unicodedata.normalize("NFKD", one)) for one in (text, longer))
        else:
            pieces = whole.pre_tokenizer.pre_tokenize_str(text)
            before, after = len(text.encode()), sum(len(piece.encode()) for piece, _ in pieces)
        assert after <= factor * before + added, steps
        measured, most = measured + 1, max(most, after / before)
    assert measured > 1500
    assert most > 4


def _tokenizer(document, part) -> Tokenizer:
    whole = json.loads(Tokenizer(BPE()).to_str()) | {part: document}
    return Tokenizer.from_str(json.dumps(whole))


def _normalizer(document) -> Normalizer:
    found = _tokenizer(document, "normalizer").normalizer
    assert found is not None
    return found
