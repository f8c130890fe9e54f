"""Repositories of several modules: sentence-transformers loads source and container alike."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

import codecllm.loader
from codecllm.converter import convert

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TEXTS = ["a b c", "d e", "f"]
assert codecllm.loader  # registers the format with transformers


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )


def _config(**more):
    return transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=16,
        max_position_embeddings=40,
        **more,
    )


def _bert(folder):
    torch.manual_seed(0)
    transformers.BertModel(_config()).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _embedder(tmp_path):
    """Transformer, pooling, a Dense module with weights of its own, normalization."""
    from sentence_transformers import SentenceTransformer, models

    torch.manual_seed(1)
    word = models.Transformer(str(_bert(tmp_path / "bert")))
    pooling = models.Pooling(64)
    dense = models.Dense(in_features=64, out_features=32)
    modules = [word, pooling, dense, models.Normalize()]
    SentenceTransformer(modules=modules).save(str(tmp_path / "source"))
    return tmp_path / "source"


def _assert_same_embeddings(source, container):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(source), device="cpu").encode(TEXTS, convert_to_tensor=True)
    model = SentenceTransformer(str(container), device="cpu")
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), expected)


def test_a_dense_module(tmp_path):
    source = _embedder(tmp_path)
    report = convert(source, tmp_path / "c", scheme="lossless")
    assert (tmp_path / "c" / "2_Dense" / "model.safetensors").exists()
    assert {one.name for one in report.left} <= {"README.md"}
    _assert_same_embeddings(source, tmp_path / "c")


def test_the_transformer_in_a_folder_of_its_own(tmp_path):
    """`0_Transformer/`, as older repositories have it."""
    source = _embedder(tmp_path)
    modules = json.loads((source / "modules.json").read_text())
    kept = {"modules.json", "config_sentence_transformers.json", "README.md"}
    (source / "0_Transformer").mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name not in kept:
            shutil.move(path, source / "0_Transformer")
    modules[0]["path"] = "0_Transformer"
    (source / "modules.json").write_text(json.dumps(modules))
    convert(source, tmp_path / "c", scheme="lossless")
    _assert_same_embeddings(source, tmp_path / "c")


def test_int8_stays_near(tmp_path):
    from sentence_transformers import SentenceTransformer

    source = _embedder(tmp_path)
    convert(source, tmp_path / "c", include=("encoder.*dense.weight",))
    expected = SentenceTransformer(str(source), device="cpu").encode(TEXTS, convert_to_tensor=True)
    model = SentenceTransformer(str(tmp_path / "c"), device="cpu")
    actual = model.encode(TEXTS, convert_to_tensor=True)
    assert torch.nn.functional.cosine_similarity(actual, expected).min() > 0.999


def test_a_cross_encoder(tmp_path):
    from sentence_transformers import CrossEncoder

    torch.manual_seed(2)
    source = tmp_path / "source"
    transformers.BertForSequenceClassification(_config(num_labels=1)).save_pretrained(source)
    _tokenizer().save_pretrained(source)
    convert(source, tmp_path / "c", scheme="lossless")
    pairs = [("a b", "c"), ("d", "e f")]
    expected = CrossEncoder(str(source), device="cpu").predict(pairs)
    assert (CrossEncoder(str(tmp_path / "c"), device="cpu").predict(pairs) == expected).all()


def test_a_clip_folder(tmp_path):
    """`0_CLIPModel/` with both towers, tokenizer and image processor."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    source = tmp_path / "source"
    main = source / "0_CLIPModel"
    torch.manual_seed(3)
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 4, "projection_dim": 32}
    text = tower | {"vocab_size": 16, "max_position_embeddings": 32, "eos_token_id": 3}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config=tower | {"image_size": 32, "patch_size": 16},
        projection_dim=32,
    )
    transformers.CLIPModel(config).save_pretrained(main)
    size = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    transformers.CLIPProcessor(images, _tokenizer()).save_pretrained(main)
    kind = "sentence_transformers.models.CLIPModel"
    entry = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": kind}
    (source / "modules.json").write_text(json.dumps([entry]))
    convert(source, tmp_path / "c", scheme="lossless")
    _assert_same_embeddings(source, tmp_path / "c")
    picture = [Image.new("RGB", (40, 40), (200, 30, 90))]
    embeddings = [
        SentenceTransformer(str(folder), device="cpu").encode(picture, convert_to_tensor=True)
        for folder in (source, tmp_path / "c")
    ]
    # Convolutions round differently where the same weights lie at other addresses.
    torch.testing.assert_close(*embeddings)
    weights = [
        transformers.CLIPModel.from_pretrained(folder).state_dict()
        for folder in (main, tmp_path / "c")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
