"""Folders as people have them: the container loads as transformers loads the folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from codecllm import api
from codecllm.converter import convert
from codecllm.formats.errors import BaselineError, SourceError, UnsupportedEnvironmentError
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier import verify
from codecllm.verifier.model_comparison import compare_models

INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[1, 5, 9, 7]])


def _llama(folder, seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, **options)
    return folder


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def _assert_loads_as(source, container, *, verified=True):
    expected = _logits(transformers.AutoModelForCausalLM.from_pretrained(source))
    assert torch.equal(_logits(from_pretrained(container)), expected)
    plain = transformers.AutoModelForCausalLM.from_pretrained(container)
    assert torch.equal(_logits(plain), expected)
    if verified:
        assert verify(container, source=source, baseline=False).ok


def _edit_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_weights_that_the_config_names(tmp_path):
    source = _llama(tmp_path / "named")
    (source / "model.safetensors").rename(source / "special.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["transformers_weights"] = "special.safetensors"
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", scheme="lossless")
    _assert_loads_as(source, tmp_path / "out")
    assert compare_models(tmp_path / "out", source, run=False)["same"]


def test_two_sets_of_weights(tmp_path):
    source = _llama(tmp_path / "both", 0, max_shard_size="1MB")
    shutil.copy(_llama(tmp_path / "new", 1) / "model.safetensors", source)
    report = convert(source, tmp_path / "c", scheme="lossless")
    assert report.taken.startswith("model.safetensors: ")
    assert {one.name for one in report.left} >= {INDEX, "model-00001-of-00004.safetensors"}
    _assert_loads_as(source, tmp_path / "c")


def test_a_left_over_index(tmp_path):
    source = _llama(tmp_path / "m")
    names = load_file(source / "model.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    report = convert(source, tmp_path / "c", scheme="lossless")
    assert INDEX in {one.name for one in report.left}
    _assert_loads_as(source, tmp_path / "c")


@pytest.mark.parametrize("case", ["entry without tensor", "tensor without entry", "in two files"])
def test_index_and_files_disagree(tmp_path, case):
    source = _llama(tmp_path / "s", max_shard_size="1MB")
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    last = sorted(set(weight_map.values()))[-1]
    if case == "entry without tensor":
        _edit_index(source, lambda weights: weights.update({"mtp.fc.weight": last}))
    else:
        home = weight_map["model.norm.weight"]
        other = next(name for name in set(weight_map.values()) if name != home)
        more = {"model.norm.weight": load_file(source / home)["model.norm.weight"]}
        if case == "tensor without entry":
            other, more = last, {"mtp.fc.weight": torch.ones(4, 4)}
        save_file(load_file(source / other) | more, source / other, {"format": "pt"})
    convert(source, tmp_path / "c", scheme="lossless")
    expected = _logits(transformers.AutoModelForCausalLM.from_pretrained(source))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert torch.equal(_logits(plain), expected)


def test_a_folder_of_links(tmp_path):
    source = _llama(tmp_path / "m")
    view = tmp_path / "view"
    view.mkdir()
    for path in source.iterdir():
        (view / path.name).symlink_to(path)
    convert(view, tmp_path / "c", scheme="lossless")
    _assert_loads_as(view, tmp_path / "c")


def test_named_chat_templates_and_every_file_of_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    source = _llama(tmp_path / "m")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )
    tokenizer.chat_template = {"default": "D", "rag": "R", "tool_use": "T"}
    tokenizer.save_pretrained(source)
    names = ("source.spm", "target.spm", "spm.model", "bpe.codes", "tekken.json", "my vocab.x")
    for name in names:
        (source / name).write_text("x")
    report = convert(source, tmp_path / "c")
    assert report.left == []
    for folder in (source, tmp_path / "c"):
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        message = [{"role": "user", "content": "x"}]
        for name, text in (("rag", "R"), ("tool_use", "T"), (None, "D")):
            got = loaded.apply_chat_template(message, chat_template=name, tokenize=False)
            assert got == text
    assert all((tmp_path / "c" / name).exists() for name in names)


def test_marian_tokenizer(tmp_path):
    """Its two sentencepiece models have names that no other tokenizer has."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    import sentencepiece

    source = _llama(tmp_path / "m")
    text = tmp_path / "text"
    text.write_text("\n".join(f"a small text of words {number}" for number in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "p"), vocab_size=40, minloglevel=2
    )
    for name in ("source.spm", "target.spm"):
        shutil.copy(tmp_path / "p.model", source / name)
    pieces = {line.split("\t")[0]: n for n, line in enumerate((tmp_path / "p.vocab").open())}
    (source / "vocab.json").write_text(json.dumps(pieces | {"<pad>": len(pieces)}))
    convert(source, tmp_path / "c")
    ids = [
        transformers.MarianTokenizer.from_pretrained(folder)("a small text").input_ids
        for folder in (source, tmp_path / "c")
    ]
    assert ids[0] == ids[1]


def test_an_adapter_is_refused_with_the_way_to_go_on(tmp_path):
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(_llama(tmp_path / "base"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    with pytest.raises(SourceError, match=r"adapter \(LORA\) of .*base.*merge_and_unload"):
        convert(tmp_path / "lora", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_adapter_beside_its_base_is_not_of_the_source(tmp_path):
    """transformers applies it where peft is installed, as it is for this test."""
    import peft

    source = _llama(tmp_path / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(source)
    expected = _logits(plain)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "lora")
    for path in (tmp_path / "lora").glob("adapter_*"):
        shutil.copy(path, source)
    adapted = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(_logits(adapted), expected)
    assert torch.equal(_logits(load_plain(source)), expected)
    api.convert(source, tmp_path / "c", scheme="lossless")
    assert torch.equal(_logits(from_pretrained(tmp_path / "c")), expected)
    done = verify(tmp_path / "c", source=source)
    assert done.ok
    assert not any(stage.skipped for stage in done.stages)
    assert compare_models(source, tmp_path / "c")["same"]


def test_folders_whose_name_is_not_utf8(tmp_path):
    """safetensors opens no such path: a container works all the same, a plain model is an error."""
    source = _llama(tmp_path / "m")
    convert(source, tmp_path / "c", scheme="lossless")
    odd = [shutil.copytree(tmp_path / name, tmp_path / f"{name}\udcff") for name in ("m", "c")]
    assert torch.equal(_logits(from_pretrained(odd[1])), _logits(from_pretrained(tmp_path / "c")))
    assert verify(odd[1], source=source, baseline=False).ok
    assert compare_models(odd[1], tmp_path / "c")["same"]
    with pytest.raises(UnsupportedEnvironmentError, match=r"m\\udcff'?: .*path is not UTF-8"):
        compare_models(source, odd[0])


@pytest.mark.parametrize("scheme", ["int8", "lossless"])
def test_a_block_that_a_merge_left(tmp_path, scheme):
    source = _llama(tmp_path / "m")
    plain = shutil.copytree(source, tmp_path / "plain")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps(config))
    report = convert(source, tmp_path / "c", scheme=scheme)
    assert "bitsandbytes, but no tensor is quantized" in report.warnings[0]
    if scheme == "lossless":
        _assert_loads_as(plain, tmp_path / "c", verified=False)
        assert verify(tmp_path / "c", source=source, baseline=False).ok


def test_a_model_that_needs_its_own_code_has_no_baseline(tmp_path):
    """The conversion is no failure: only the model cannot run here."""
    source = _llama(tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "configuration_own.py").write_text("raise SystemExit\n")
    (source / "tokenizer.json").write_text("{}")
    converted = api.convert(source, tmp_path / "c", scheme="lossless")
    assert converted.baseline.kind == "none"
    assert "custom code" in converted.baseline.reason
    assert any("--with-code" in line for line in converted.report.warnings)
    with pytest.raises(BaselineError):
        api.convert(source, tmp_path / "d", scheme="lossless", baseline=True)
