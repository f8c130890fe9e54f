"""Sources that are not just one dtype, one shard and the tensors of their class."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from codecllm.api import export
from codecllm.converter import convert
from codecllm.formats.errors import ModelMismatchError
from codecllm.formats.manifest.manifest import MANIFEST_NAME
from codecllm.formats.manifest.reading import parse_manifest
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier import verify
from tests import tampering
from tests.integration.outputs import logits, same_bits

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _is_tied(model):
    return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def _records(folder):
    return {
        record.name: record
        for record in parse_manifest((folder / MANIFEST_NAME).read_bytes()).tensors
    }


def _changed(tiny, tmp_path, change, name="llama"):
    """Copies a tiny model and lets `change` edit its dict of tensors."""
    source = tampering.copy_of(tiny(name), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    return source


def _mix(tensors):
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to((torch.bfloat16, torch.float32, torch.float16)[number % 3])


def test_mixed_dtypes_keep_every_bit_and_load_as_the_source_does(tiny, tmp_path):
    source = _changed(tiny, tmp_path, _mix)
    convert(source, tmp_path / "c", scheme="lossless")
    assert {record.dtype for record in _records(tmp_path / "c").values()} == {"BF16", "F16", "F32"}
    theirs, ours = load_plain(source).state_dict(), from_pretrained(tmp_path / "c").state_dict()
    assert theirs.keys() == ours.keys()
    assert all(same_bits(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("resident", ["dense", "int8", "compressed"])
def test_mixed_dtypes_under_int8(tiny, tmp_path, resident):
    convert(_changed(tiny, tmp_path, _mix), tmp_path / "c", scheme="int8", include=("*",))
    model = from_pretrained(tmp_path / "c", resident=resident)
    assert model.dtype == torch.bfloat16  # the config's
    assert torch.isfinite(logits(model)).all()


def test_a_source_that_says_tied_but_stores_both_alike(tiny, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = _changed(tiny, tmp_path, change)
    for scheme in ("lossless", "int8"):
        out = tmp_path / scheme
        convert(source, out, scheme=scheme, include=("*",) if scheme == "int8" else ())
        assert _records(out)["model.embed_tokens.weight"].alias_of == "lm_head.weight"
        for resident in ("dense", "compressed"):
            model = from_pretrained(out, resident=resident)
            if scheme == "lossless":
                assert torch.equal(logits(model), logits(load_plain(source)))
    theirs, ours = load_plain(source), from_pretrained(tmp_path / "lossless")
    assert _is_tied(ours) == _is_tied(theirs)  # transformers 5.0 leaves them apart


def test_a_source_that_says_tied_but_stores_two_different_ones(tiny, tmp_path):
    """A container gives the model that transformers makes of its source."""

    def change(tensors):
        tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]

    source = _changed(tiny, tmp_path, change)
    convert(source, tmp_path / "c", scheme="lossless")
    assert torch.equal(logits(from_pretrained(tmp_path / "c")), logits(load_plain(source)))


def test_extra_heads_beside_the_model_are_an_error_that_names_them(tiny, tmp_path):
    def change(tensors):
        tensors["value_head.weight"] = torch.ones(1, 64, dtype=torch.bfloat16)

    convert(_changed(tiny, tmp_path, change), tmp_path / "c", scheme="lossless")
    with pytest.raises(ModelMismatchError, match=r"not in the model: value_head\.weight"):
        from_pretrained(tmp_path / "c")


def test_a_tower_can_be_left_out_by_a_glob(tiny, tmp_path):
    convert(
        tiny("llava"),
        tmp_path / "c",
        scheme="int8",
        include=("*",),
        exclude=("*vision_tower*", "*multi_modal_projector*"),
    )
    records = _records(tmp_path / "c")
    tower = {
        name: record.scheme
        for name, record in records.items()
        if "vision" in name or "projector" in name
    }
    assert len(tower) > 10
    assert not {"int8"} & set(tower.values())
    assert sum(record.scheme == "int8" for record in records.values()) > 10
    source, model = (
        load_plain(tiny("llava")).state_dict(),
        from_pretrained(tmp_path / "c").state_dict(),
    )
    assert all(
        same_bits(source[name], model[name])
        for name in source
        if "vision" in name or "projector" in name
    )


def test_chat_template_and_generation_config_are_kept(tiny, tmp_path):
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    words = WordLevel({f"t{number}": number for number in range(512)}, unk_token="t0")
    Tokenizer(words).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "temperature": 0.5, "do_sample": True})
    )
    convert(source, tmp_path / "c", scheme="int8")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "c").chat_template == TEMPLATE
    for resident in ("dense", "compressed"):
        kept = from_pretrained(tmp_path / "c", resident=resident).generation_config
        assert (kept.eos_token_id, kept.temperature, kept.do_sample) == (7, 0.5, True)


def test_numbers_of_a_config_that_only_python_reads(tiny, tmp_path):
    """Published files of Mamba-2 hold `"time_step_limit": [0.0, Infinity]`."""
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    added = '"time_step_limit": [0.0, Infinity], "floor": -Infinity, "none": NaN, '
    added += '"large": 1000000000000000019884624838656, "over": 1e999,'
    for name in ("config.json", "generation_config.json"):
        text = (source / name).read_text()
        (source / name).write_text("{" + added + text.partition("{")[2])
    convert(source, tmp_path / "c", scheme="int8", include=("*",))
    written = json.loads((tmp_path / "c" / "config.json").read_text())
    expected = json.loads((source / "config.json").read_text())
    del written["quantization_config"]
    assert repr(sorted(written.items())) == repr(sorted(expected.items()))
    assert verify(tmp_path / "c", source=source, baseline=False).ok
    for resident in ("dense", "int8", "compressed"):
        model = from_pretrained(tmp_path / "c", resident=resident)
        assert model.config.time_step_limit == [0.0, float("inf")]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert model.config.floor == -float("inf") and model.config.large == 10**30 + 19884624838656
    export(tmp_path / "c", tmp_path / "plain")
    assert "Infinity" in (tmp_path / "plain" / "config.json").read_text()
