"""Side files: the rules for copies, names of the rest, repositories of several modules, code."""

from __future__ import annotations

import json

import numpy as np
import pytest

from codecllm.converter import convert
from codecllm.converter.source import selection
from codecllm.formats import BASE_VERSION, FORMAT_VERSION
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    CodecLLMError,
    LimitError,
    NotAContainerError,
    SchemaError,
    SourceError,
    UnsafeSourceError,
)
from codecllm.formats.reference import read_tensor_bytes
from tests.sources import write_source

WEIGHTS = {"a": ("F32", np.arange(16, dtype=np.float32).reshape(4, 4))}


def _source(tmp_path, names=(), config=None):
    source = write_source(tmp_path / "s", WEIGHTS, config or {"model_type": "x"})
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    return source


def _copied(tmp_path):
    out = tmp_path / "out"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    own = {"codecllm.json", "config.json", "model.safetensors.index.json"}
    return {name for name in names - own if not name.startswith("model-")}


def _left(report):
    return {one.name: one.reason for one in report.left}


TOKENIZERS = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "spm.model"),
    *("source.spm", "target.spm", "target_vocab.json", "bpe.codes", "dict.txt", "tekken.json"),
    *("sentencepiece.bpe.model", "sentencepiece.model", "spm_char.model", "tiktoken.model"),
    *("vocab-src.json", "vocab-tgt.json", "entity_vocab.json", "normalizer.json", "emoji.json"),
    *("byte_maps.json", "prophetnet.tokenizer", "word_shape.json", "word_pronunciation.json"),
    *("qwen.tiktoken", "my vocab.tiktoken", "vocab", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/rag.jinja", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "speaker_embeddings_path.json", "voices/a/b/c.npy"),
    *("generation_config.json", "LICENSE", "USE_POLICY.md", "1 old (copy)/config.json", "ü.txt"),
]


def test_every_file_that_is_no_weight_and_no_code_is_copied(tmp_path):
    report = convert(_source(tmp_path, TOKENIZERS), tmp_path / "out")
    assert _copied(tmp_path) == set(TOKENIZERS)
    assert report.left == []
    with Container(tmp_path / "out") as container:
        assert container.manifest.required_features == ["paths"]
        assert container.manifest.format_version == FORMAT_VERSION
        for record in container.manifest.files:
            container.read_side_file(record)


def test_plain_names_need_no_newer_format(tmp_path):
    report = convert(_source(tmp_path, ["vocab.txt", "1_Pooling/config.json"]), tmp_path / "out")
    assert report.manifest.format_version == BASE_VERSION
    assert report.manifest.required_features == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("modeling_x.py", "code"),
        ("run.sh", "code"),
        ("lib.so", "code"),
        ("pytorch_model.bin", "pickle"),
        ("x.pt", "pickle"),
        ("X.PKL", "pickle"),
        ("pytorch_model.bin.index.json", "index of weights that the model does not load"),
        ("model.gguf", "weights in another format"),
        ("flax_model.msgpack", "weights in another format"),
        ("tf_model.h5", "weights in another format"),
        ("data.zip", "archive"),
        (".hidden", "hidden"),
        ("README.md", "describes the source's repository"),
        ("baseline.json", "the container has its own"),
        ("a:b.json", "its name does not mean the same file on every system"),
        ("a\u202eb.json", "its name does not mean the same file on every system"),
        ("a\nb.json", "its name does not mean the same file on every system"),
    ],
)
def test_what_is_not_copied_is_named(tmp_path, name, reason):
    report = convert(_source(tmp_path, [name]), tmp_path / "out")
    assert _left(report) == {name: reason}
    assert _copied(tmp_path) == set()


def test_large_files_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "MAX_COPIED_BYTES", 3 << 20)
    source = _source(tmp_path, ["small.json"])
    (source / "large.json").write_bytes(bytes((3 << 20) + 1))
    report = convert(source, tmp_path / "out")
    assert _left(report) == {"large.json": "larger than 3 MiB"}
    assert _copied(tmp_path) == {"small.json"}


def test_names_that_differ_by_case_only(tmp_path):
    report = convert(_source(tmp_path, ["Vocab.txt", "vocab.txt"]), tmp_path / "out")
    assert _left(report) == {"vocab.txt": "differs from Vocab.txt only by case"}


def test_something_that_is_no_file(tmp_path):
    import os

    source = _source(tmp_path)
    os.mkfifo(source / "pipe")
    (source / "gone.json").symlink_to(tmp_path / "nowhere")
    left = _left(convert(source, tmp_path / "out"))
    assert set(left) == {"pipe", "gone.json"}


def test_too_many_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "MAX_COPIED_FILES", 2)
    report = convert(_source(tmp_path, ["a.txt", "b.txt", "c.txt"]), tmp_path / "out")
    assert _left(report) == {"c.txt": "more than 2 files"}


# Folders that are links.


@pytest.mark.parametrize("target", [".", "..", "../s"])
def test_links_to_a_folder_above_are_not_entered(tmp_path, monkeypatch, target):
    monkeypatch.setattr(selection, "MAX_ENTRIES", 100)
    source = _source(tmp_path / "above", ["s/vocab.txt"])
    for number in range(12):
        (source / "s" / f"l{number}").symlink_to(target)
    report = convert(source, tmp_path / "out")
    assert _copied(tmp_path) == {"s/vocab.txt"}
    reason = "link to a folder in which it stands"
    assert _left(report) == {f"s/l{number}/": reason for number in range(12)}


def test_two_links_to_one_folder_are_both_entered(tmp_path):
    source = _source(tmp_path, ["a/vocab.txt"])
    (source / "b").symlink_to("a")
    convert(source, tmp_path / "out")
    assert _copied(tmp_path) == {"a/vocab.txt", "b/vocab.txt"}


@pytest.mark.parametrize("kind", ["links without a cycle", "many files"])
def test_folders_that_seem_to_have_too_many_entries_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(selection, "MAX_ENTRIES", 5000)
    source = _source(tmp_path)
    if kind == "many files":
        (source / "s").mkdir()
        for number in range(2500):
            (source / "s" / f"{number}.txt").touch()
    for level in range(8 if kind != "many files" else 0):
        folder = tmp_path / f"level{level}"
        folder.mkdir()
        for number in range(8):
            (folder / f"l{number}").symlink_to(tmp_path / f"level{level + 1}")
    if kind != "many files":
        (tmp_path / "level8").mkdir()
        (source / "s").symlink_to(tmp_path / "level0")
    with pytest.raises(LimitError, match="a folder that holds the model alone") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.file == str(source)
    assert not (tmp_path / "out").exists()


# Code.


def test_code_is_left_and_said(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    report = convert(_source(tmp_path, ["configuration_own.py"], config), tmp_path / "out")
    assert any("1 Python files are left out; --with-code" in line for line in report.warnings)
    assert "code" not in report.manifest.required_features


def test_code_is_copied_where_asked_for(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    names = ["configuration_own.py", "parts/modeling_own.py", "run.sh"]
    report = convert(_source(tmp_path, names, config), tmp_path / "out", with_code=True)
    assert report.warnings == []
    assert _left(report) == {"run.sh": "code"}
    assert report.manifest.required_features == ["code"]
    assert report.manifest.file("parts/modeling_own.py") is not None


def test_asking_for_code_where_there_is_none(tmp_path):
    report = convert(_source(tmp_path), tmp_path / "out", with_code=True)
    assert report.warnings == ["--with-code: the source holds no Python files"]


# Repositories of several modules.


def _modules(source, *paths, types=()):
    entries = [
        {"idx": number, "name": str(number), "path": path, "type": "sentence_transformers.models.X"}
        for number, path in enumerate(paths)
    ]
    (source / "modules.json").write_text(json.dumps(entries))


def _module(folder, seed, config=None):
    rng = np.random.default_rng(seed)
    return write_source(
        folder, {"linear.weight": ("F32", rng.standard_normal((8, 8)).astype(np.float32))}, config
    )


def test_weights_of_modules_are_copied(tmp_path):
    source = _source(tmp_path, ["1_Pooling/config.json", "sentence_bert_config.json"])
    _module(source / "2_Dense", 1, {"in_features": 8})
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    _modules(source, "", "1_Pooling", "2_Dense")
    report = convert(source, tmp_path / "out")
    expected = {
        *("1_Pooling/config.json", "sentence_bert_config.json", "modules.json"),
        *("2_Dense/config.json", "2_Dense/model.safetensors"),
    }
    assert _copied(tmp_path) == expected
    assert _left(report) == {"2_Dense/pytorch_model.bin": "pickle"}
    copied = (tmp_path / "out" / "2_Dense" / "model.safetensors").read_bytes()
    assert copied == (source / "2_Dense" / "model.safetensors").read_bytes()


def test_the_index_of_a_modules_shards_is_copied(tmp_path):
    source = _source(tmp_path)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    _module(source / "1_D", 1)
    (source / "1_D" / "model.safetensors").rename(source / "1_D" / names[0])
    (source / "1_D" / names[1]).write_bytes((source / "1_D" / names[0]).read_bytes())
    (source / "1_D" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (source / "1_D" / "pytorch_model.bin.index.json").write_text("{}")
    _modules(source, "", "1_D")
    report = convert(source, tmp_path / "out")
    expected = {f"1_D/{name}" for name in (*names, "model.safetensors.index.json")}
    assert _copied(tmp_path) >= expected
    assert set(_left(report)) == {"1_D/pytorch_model.bin.index.json"}


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"format": "codecllm-load-report"}'])
def test_a_load_report_of_the_source_is_left(tmp_path, text):
    source = _source(tmp_path, ["baseline.json"])
    (source / "load_report.json").write_text(text)
    report = convert(source, tmp_path / "out", scheme="lossless")
    own = dict.fromkeys(("baseline.json", "load_report.json"), "the container has its own")
    assert _left(report) == own and _copied(tmp_path) == set()


@pytest.mark.parametrize(
    "folder",
    ["load_report.json", "BASELINE.json", "config.json", "model-00001-of-00001.safetensors"],
)
def test_a_folder_with_the_name_of_a_file_of_the_container_is_left(tmp_path, folder):
    source = _source(tmp_path)
    if folder == "config.json":
        (source / folder).unlink()
    (source / folder).mkdir()
    (source / folder / "x.txt").write_text("x")
    try:
        report = convert(source, tmp_path / "out")
    except CodecLLMError:
        assert folder == "config.json"  # that is no config
        return
    assert "its folder has the name" in _left(report)[f"{folder}/x.txt"]


def test_a_module_of_which_only_a_pickle_is_there(tmp_path):
    source = _source(tmp_path, ["2_Dense/config.json", "2_Dense/pytorch_model.bin"])
    _modules(source, "", "2_Dense")
    with pytest.raises(UnsafeSourceError, match="weights of a module are a pickle"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_too_large_to_be_copied(tmp_path, monkeypatch):
    source = _source(tmp_path)
    _module(source / "2_Dense", 1)
    _modules(source, "", "2_Dense")
    monkeypatch.setattr(selection.limits, "SIDE_FILE_BYTES", 16)
    with pytest.raises(LimitError, match="too large to be copied"):
        convert(source, tmp_path / "out")


def test_the_main_module_may_stand_in_a_folder(tmp_path):
    source = tmp_path / "s"
    main = _module(source / "0_CLIPModel", 1, {"model_type": "clip"})
    (main / "vocab.json").write_text("{}")
    (main / "LICENSE").write_text("main")
    (source / "LICENSE").write_text("root")
    (source / "config_sentence_transformers.json").write_text("{}")
    # Of no module: transformers would read them as the main one's.
    foreign = {"generation_config.json", "tokenizer_config.json", "vocab.txt", "chat.jinja"}
    for name in foreign:
        (source / name).write_text("{}")
    _module(source / "1_Dense", 2)
    _modules(source, "0_CLIPModel", "1_Dense")
    report = convert(source, tmp_path / "out")
    out = tmp_path / "out"
    assert report.taken == "model.safetensors of 0_CLIPModel/: 1 tensors"
    assert json.loads((out / "config.json").read_text())["model_type"] == "clip"
    assert [entry["path"] for entry in json.loads((out / "modules.json").read_text())] == [
        "",
        "1_Dense",
    ]
    assert {"vocab.json", "1_Dense/model.safetensors"} <= _copied(tmp_path)
    assert (out / "LICENSE").read_text() == "main"
    assert set(_left(report)) == {"LICENSE", *foreign}
    assert not foreign & _copied(tmp_path)
    with Container(out) as container:
        assert len(read_tensor_bytes(container, "linear.weight")) == 256


def test_modules_of_a_router_are_copied(tmp_path):
    source = _source(tmp_path)
    _module(source / "1_Router" / "query_0_Dense", 1)
    config = {"types": {"query_0_Dense": "sentence_transformers.models.Dense"}}
    (source / "1_Router" / "router_config.json").write_text(json.dumps(config))
    _modules(source, "", "1_Router")
    convert(source, tmp_path / "out")
    assert "1_Router/query_0_Dense/model.safetensors" in _copied(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '[{"path": "../x"}]', '[{"path": 3}]', "{}"])
def test_modules_that_cannot_be_read(tmp_path, text):
    source = _source(tmp_path)
    (source / "modules.json").write_text(text)
    with pytest.raises((SourceError, SchemaError)) as caught:
        convert(source, tmp_path / "out")
    assert caught.value.file == "modules.json"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "figure.png"])
def test_a_text_that_is_a_git_lfs_pointer_is_refused(tmp_path, name):
    source = _source(tmp_path, [name])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 9\n"
    (source / name).write_text(pointer)
    if name == "figure.png":
        convert(source, tmp_path / "out")
        return
    with pytest.raises(NotAContainerError, match="Git LFS pointer") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.file == name and not (tmp_path / "out").exists()
