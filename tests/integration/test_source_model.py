"""`verify --source` asks transformers for the source's model, and the baseline has a floor."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import codecllm
from codecllm.converter import convert
from codecllm.formats.errors import BaselineError, ModelMismatchError
from codecllm.formats.manifest.manifest import source_features
from codecllm.loader.hf.plain import load_plain
from codecllm.verifier import Verdict, verify
from codecllm.verifier.baseline.floor import below_floor
from codecllm.verifier.baseline.inference import repeatable_inference
from codecllm.verifier.baseline.record import Agreement
from codecllm.verifier.load_report import record_load_report
from codecllm.verifier.report import Stage
from codecllm.verifier.source_files import check_config
from tests import tampering
from tests.integration import tiny_models

TEMPLATES = {"default": "{{ messages[0]['content'] }}", "rag": "{{ messages|length }} documents"}


def _with_tokenizer(folder):
    words = WordLevel({f"t{number}": number for number in range(512)}, unk_token="t0")
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0")
    fast.chat_template = TEMPLATES["default"]
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny):
    folder = tampering.copy_of(tiny("llama"), tmp_path_factory.mktemp("source") / "llama")
    return _with_tokenizer(folder)


def _model_stage(out, source):
    report = verify(out, source=source, baseline=False)
    stage = report.stage("model")
    assert stage is not None
    return report, stage


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5", "bert", "mpnet", "llava"])
def test_a_container_of_the_source_is_verified(tiny, container, name, scheme):
    report, stage = _model_stage(container(name, scheme), tiny(name))
    assert report.ok
    assert stage.verdict is Verdict.OK
    assert "as transformers loads the source" in stage.summary


def test_code_that_differs_from_the_sources(tmp_path, source):
    """Under trust_remote_code=True it is the model."""
    for number in (1, 2):
        copy = tampering.copy_of(source, tmp_path / f"s{number}")
        (copy / "modeling_x.py").write_text(f"a = {number}\n")
    codecllm.convert(tmp_path / "s1", tmp_path / "out", with_code=True, baseline=False)
    assert verify(tmp_path / "out", source=tmp_path / "s1").ok
    report, stage = _model_stage(tmp_path / "out", tmp_path / "s2")
    assert [finding.error.file for finding in stage.findings] == ["modeling_x.py"]
    assert not report.ok


@pytest.mark.parametrize("is_in_source", [True, False])
def test_files_of_a_container_that_a_conversion_would_not_copy(tmp_path, source, is_in_source):
    """Of an earlier converter's rules: the source has them. Of somebody else's: it does not."""
    copy = tampering.copy_of(source, tmp_path / "s")
    codecllm.convert(copy, tmp_path / "out", baseline=False)
    tampering.add_listed(tmp_path / "out", "other/x.py", b"a = 1\n")
    if is_in_source:
        (copy / "other").mkdir()
        (copy / "other" / "x.py").write_bytes(b"a = 1\n")
    report, stage = _model_stage(tmp_path / "out", copy)
    assert report.ok == is_in_source
    if is_in_source:
        (copy / "other" / "x.py").write_bytes(b"a = 2\n")
        report, stage = _model_stage(tmp_path / "out", copy)
    assert [finding.error.file for finding in stage.findings] == ["other/x.py"]


def test_a_model_that_draws_random_numbers_in_inference(tmp_path):
    """Speech of VITS has random lengths: both models draw the same numbers, and nobody else's."""
    config = hf.VitsConfig(
        **{"vocab_size": 38, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"ffn_dim": 32, "flow_size": 32, "spectrogram_bins": 33, "upsample_rates": [8, 4]},
        **{"upsample_initial_channel": 32, "upsample_kernel_sizes": [16, 8]},
        **{"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]},
        **{"prior_encoder_num_flows": 1, "prior_encoder_num_wavenet_layers": 1},
        **{"posterior_encoder_num_wavenet_layers": 1, "depth_separable_num_layers": 1},
        duration_predictor_filter_channels=32,
    )
    source = tiny_models.save(tmp_path / "source", hf.VitsModel(config), dtype=torch.float32)
    convert(source, tmp_path / "out", scheme="lossless")
    report, stage = _model_stage(tmp_path / "out", source)
    assert report.ok and stage.verdict is Verdict.OK, report.to_json()
    model = load_plain(source)
    before = torch.get_rng_state()
    with repeatable_inference(model):
        assert not torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_source_that_leaves_weights_over_is_verified_with_its_record_only(tmp_path):
    config = hf.BertConfig(**{**tiny_models._ENCODER})
    source = tiny_models.save(tmp_path / "source", hf.BertForPreTraining(config))
    path = source / "config.json"
    document = json.loads(path.read_text()) | {"architectures": ["BertForMaskedLM"]}
    path.write_text(json.dumps(document))
    convert(source, tmp_path / "out", scheme="lossless")
    report, stage = _model_stage(tmp_path / "out", source)
    assert not report.ok
    assert "cls.seq_relationship.weight" in str(stage.findings[0].error)
    assert "leaves weights over" in record_load_report(tmp_path / "out")
    report, stage = _model_stage(tmp_path / "out", source)
    assert report.ok


def test_weights_that_transformers_would_take_from_another_file_are_found(tmp_path, tiny):
    """The converter may take either: transformers prefers one complete file to a sharded set."""
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    convert(source, tmp_path / "out", scheme="lossless")
    other = tampering.copy_of(source, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    report, _ = _model_stage(tmp_path / "out", other)
    assert not report.ok


CHANGES = {
    "generation defaults differ": lambda folder: (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 9, "max_new_tokens": 3})
    ),
    "tie_word_embeddings": lambda folder: _edit(folder / "config.json", tie_word_embeddings=False),
    "the container lacks this file": lambda folder: (folder / "merges.txt").write_text("a b\n"),
    "chat template": lambda folder: (folder / "chat_template.jinja").write_text("other"),
    "tokens": lambda folder: _edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"}),
}


def _edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("words", sorted(CHANGES))
def test_what_differs_from_the_source_is_a_finding(tmp_path, source, words):
    convert(source, tmp_path / "out", scheme="int8")
    changed = tampering.copy_of(source, tmp_path / "changed")
    CHANGES[words](changed)
    report, stage = _model_stage(tmp_path / "out", changed)
    assert not report.ok
    found = " ".join(str(finding.error) for finding in stage.findings)
    if words == "tokens":
        assert "tokenizer.json" in found
    else:
        assert words in found


def test_chat_templates_are_compared_and_not_run(tmp_path, source, monkeypatch):
    """A few loops in one take hours, and a few additions all memory."""
    source = tampering.copy_of(source, tmp_path / "source")
    ran = []
    monkeypatch.setattr(
        hf.PreTrainedTokenizerBase, "apply_chat_template", lambda *_, **__: ran.append(1) or "text"
    )
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (source / "chat_template.jinja").write_text(loops)
    _edit(source / "tokenizer_config.json", chat_template=loops)
    convert(source, tmp_path / "out", scheme="lossless")
    report, _ = _model_stage(tmp_path / "out", source)
    assert report.ok
    (source / "chat_template.jinja").write_text(f"{loops} other")
    _, stage = _model_stage(tmp_path / "out", source)
    assert "chat template 'default' differs" in str([one.error for one in stage.findings])
    assert not ran


def test_a_tensor_loaded_as_another_is_found(tmp_path, tiny, container, monkeypatch):
    """Not by the comparison of files: the loader itself is at fault."""
    from codecllm.loader import load

    state_dict = load.lazy_state_dict

    def swapped(*args):
        tensors = state_dict(*args)
        up, gate = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate"))
        tensors[up], tensors[gate] = tensors[gate], tensors[up]
        return tensors

    monkeypatch.setattr(load, "lazy_state_dict", swapped)
    for scheme in ("lossless", "int8"):
        report, stage = _model_stage(container("llama", scheme), tiny("llama"))
        assert not report.ok
        assert {finding.error.tensor for finding in stage.findings} >= {
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.1.mlp.gate_proj.weight",
        }


def test_a_tie_that_the_source_lacks_is_found(tmp_path, tiny, container, monkeypatch):
    from codecllm.loader import load

    finish = load.Load.finish

    def tie(self, model):
        finish(self, model)
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight

    monkeypatch.setattr(load.Load, "finish", tie)
    report, stage = _model_stage(container("llama", "int8"), tiny("llama"))
    assert not report.ok
    assert any("tied" in str(finding.error) for finding in stage.findings)


def test_a_source_that_transformers_cannot_load_is_a_reason(tmp_path, tiny):
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    _edit(source / "config.json", model_type="no_such_type", architectures=["Nope"])
    convert(source, tmp_path / "out", scheme="lossless")
    report, stage = _model_stage(tmp_path / "out", source)
    assert report.ok
    assert stage.verdict is Verdict.SKIPPED
    assert "transformers cannot load the source" in stage.summary


def test_a_config_far_larger_than_its_weights_is_not_built(tmp_path, tiny):
    """The weights that no file has would be made at random: terabytes of them here."""
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    _edit(source / "config.json", vocab_size=1 << 34)
    convert(source, tmp_path / "out", scheme="lossless")
    report, stage = _model_stage(tmp_path / "out", source)
    assert report.ok
    assert stage.verdict is Verdict.SKIPPED
    assert "GiB of memory are free" in stage.summary


# --- The floor of the baseline


@pytest.mark.parametrize(
    ("agreement", "bits", "fails"),
    [
        (Agreement(top1=1.0, mean_kl=0.0), None, False),
        (Agreement(top1=0.97, mean_kl=0.004), None, False),
        (Agreement(top1=0.0, mean_kl=0.002), None, True),
        (Agreement(top1=0.0, mean_kl=1e-5), None, False),
        (Agreement(top1=0.85, mean_kl=0.2), None, True),
        (Agreement(top1=0.95, mean_kl=0.2), None, False),
        (Agreement(top1=0.85, mean_kl=0.2), 4.5, False),
        (Agreement(top1=0.6, mean_kl=0.8), 4.5, True),
        (Agreement(top1=0.1, mean_kl=5.0), 2.0, False),
        (Agreement(cosine=0.99), None, False),
        (Agreement(cosine=0.5), None, True),
        (Agreement(), None, False),
    ],
)
def test_floor(agreement, bits, fails):
    assert (below_floor(agreement, bits) is not None) == fails


def test_a_conversion_that_ruins_the_model_is_an_error(tmp_path):
    """One outlier in each row of every matrix: eight bits leave nothing of the other weights."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**tiny_models.GROUPED, "tie_word_embeddings": False})
    source = tiny_models.save(tmp_path / "source", hf.LlamaForCausalLM(config))
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if value.ndim == 2:
            value[:, 7] = 4000.0 if name != "lm_head.weight" else value[:, 7]
            if name == "lm_head.weight":
                value *= 40
                value[:, 7] = 0
                value[:, 8] = 60000.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaselineError, match=r"codecllm diagnose"):
        codecllm.convert(source, tmp_path / "out", include=("*",), baseline=True)
    shutil.rmtree(tmp_path / "out")
    # Codes of few bits have no such floor: the caller accepted their loss.
    narrow = codecllm.convert(
        source, tmp_path / "narrow", include=("*",), code_bits=4, baseline=True
    )
    assert narrow.baseline.agreement["top1"] < 0.5


def test_random_weights_have_likeliest_tokens_by_chance(tmp_path):
    """Neither a conversion nor a verification of them ends for tokens that change places."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "num_hidden_layers": 6, "tie_word_embeddings": False}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**tiny_models.GROUPED, **sizes}))
    source = tiny_models.save(tmp_path / "source", model)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] *= 4
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    converted = codecllm.convert(source, tmp_path / "out", bits=4, calibrate="none")
    figures = converted.baseline.agreement
    # Of a model that prefers tokens this would be too far from the source.
    assert below_floor(Agreement(**figures), 4.0) is not None
    assert below_floor(Agreement(**figures), 4.0, certainty=0.3) is not None
    assert verify(tmp_path / "out").ok


def test_a_recorded_baseline_below_the_floor_is_not_verified(tmp_path, tiny):
    codecllm.convert(tiny("llama"), tmp_path / "out", scheme="int8", baseline=True)
    record = json.loads((tmp_path / "out" / "baseline.json").read_text())
    record["agreement"].update(top1=0.0, mean_kl=3.0)
    data = json.dumps(record).encode()
    tampering.replace_listed(tmp_path / "out", "baseline.json", data)
    report = verify(tmp_path / "out")
    assert not report.ok
    assert "codecllm diagnose" in str(report.stage("baseline").findings[0].error)


@pytest.mark.parametrize("names", [("proj.weight",), ("up_proj.weight",)])
@pytest.mark.parametrize("block", [None, {"quant_method": "of_tomorrow"}])
def test_a_source_whose_weights_have_other_names_is_not_loaded_at_random(
    tmp_path, tiny, names, block
):
    """A method may keep floats under names of its own: most weights are missing then."""
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    renamed = {f"{key}_u" if key.endswith(names) else key: value for key, value in tensors.items()}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    if block is not None:
        _edit(source / "config.json", quantization_config=block)
    done = codecllm.convert(source, tmp_path / "out", scheme="lossless", baseline=False)
    is_head = block is None and names == ("up_proj.weight",)
    assert any("a load is refused" in text for text in done.report.warnings) != is_head
    assert verify(tmp_path / "out").ok
    if is_head:
        codecllm.from_pretrained(tmp_path / "out")
        return
    with pytest.raises(ModelMismatchError):
        codecllm.from_pretrained(tmp_path / "out")
    with pytest.raises(BaselineError, match="ModelMismatchError"):
        codecllm.convert(source, tmp_path / "other", scheme="lossless")


def test_a_block_of_a_part_of_the_config():
    """A conversion takes it away with the quantization; other entries of the part count."""
    found = Stage("model")
    block = {"quantization_config": {"quant_method": "x"}}
    theirs = {"text_config": {"a": 1, **block}}
    check_config(json.dumps({"text_config": {"a": 1}}).encode(), json.dumps(theirs).encode(), found)
    assert not found.findings
    for ours in ({"text_config": {"a": 2}}, {"text_config": {"a": 1, "quantization_config": {}}}):
        found = Stage("model")
        check_config(json.dumps(ours).encode(), json.dumps(theirs).encode(), found)
        assert "text_config" in str(found.findings[0].error)


def test_no_report_is_recorded_of_weights_that_a_quantizer_names(tmp_path, tiny):
    """Whatever part of the config its block stands in."""
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(
        {**tensors, "a.weight_scale": tensors["model.norm.weight"].clone()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    convert(source, tmp_path / "out", scheme="lossless")

    def quantize(document):
        document["source"]["quantization"] = "x"
        document["required_features"] += source_features([], "x")

    tampering.copy_of(tmp_path / "out", tmp_path / "quantized")
    tampering.reseal(tmp_path / "quantized", quantize)
    assert "a.weight_scale" in record_load_report(tmp_path / "out")
    assert record_load_report(tmp_path / "quantized") is None
