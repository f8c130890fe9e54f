"""Published checkpoints: a container gives the model that transformers makes of its source.

docs/checkpoints.md lists the layouts and uses with the tests of this file.
"""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import codecllm
from codecllm.formats.errors import ModelMismatchError, UsageError
from codecllm.loader.load_report import LOAD_REPORT_NAME
from tests.integration import tiny_models
from tests.integration.outputs import logits, same_bits
from tests.tampering import copy_of, replace_listed

RESIDENCIES = ("dense", "int8", "compressed")
ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 512,
}


def saved(model, folder):
    """Saves a model with random weights, no two tensors alike, as float32."""
    return tiny_models.save(folder, model, dtype=torch.float32)


def llama(folder, **more):
    config = hf.LlamaConfig(**{**tiny_models.GROUPED, **more})
    return tiny_models.save(folder, hf.LlamaForCausalLM(config))


def edit_config(folder, drop=(), **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    copies = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(copies, folder / "model.safetensors", {"format": "pt"})


def convert(source, out, scheme, **options):
    include = ("*",) if scheme == "int8" else ()
    made = codecllm.convert(source, out, scheme=scheme, include=include, baseline=False, **options)
    return made.report


def warned_by_transformers(caplog, load):
    """Returns the result of `load` and the names that transformers' load report shows."""
    caplog.clear()
    logger = logging.getLogger("transformers")
    logger.propagate, before = True, logger.propagate
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            model = load()
    finally:
        logger.propagate = before
    reports = [record.message for record in caplog.records if "LOAD REPORT" in record.message]
    lines = "\n".join(reports).splitlines()
    return model, sorted(line for line in lines if "|" in line)


def assert_loads_as_the_source(source, out, cls, caplog):
    """A lossless container gives the source's class, bits and warnings, by both ways."""
    theirs, warnings = warned_by_transformers(caplog, lambda: cls.from_pretrained(source))
    expected = theirs.state_dict()
    again, same_warnings = warned_by_transformers(caplog, lambda: cls.from_pretrained(out))
    ours, our_warnings = warned_by_transformers(caplog, lambda: codecllm.from_pretrained(out))
    assert same_warnings == warnings
    assert our_warnings == warnings
    unreported = {name for name in expected if not any(name in line for line in warnings)}
    for model in (again, ours):
        assert type(model) is type(theirs)
        values = model.state_dict()
        assert values.keys() == expected.keys()
        assert all(same_bits(values[name], expected[name]) for name in unreported)
        for each in (model, theirs):
            assert hasattr(each, "generation_config") == theirs.can_generate()
        if theirs.can_generate():
            assert model.generation_config == theirs.generation_config
    return theirs, warnings


# --- Which class: `architectures` missing, null or foreign


@pytest.mark.parametrize(
    "change",
    [
        {"drop": ["architectures"]},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["FSDPLlamaForCausalLM"]},
        {"architectures": ["LlamaForCausalLMWithValueHead"]},
        {"architectures": ["PeftModelForCausalLM", "LlamaForCausalLM"]},
        {"architectures": ["OwnLlama"], "auto_map": {"AutoModelForCausalLM": "own.OwnLlama"}},
    ],
    ids=str,
)
def test_architectures_that_transformers_lacks(tmp_path, change):
    source = llama(tmp_path / "source")
    edit_config(source, **change)
    theirs = hf.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    convert(source, tmp_path / "int8", "int8")
    convert(source, tmp_path / "lossless", "lossless")
    for resident in RESIDENCIES:
        ours = codecllm.from_pretrained(tmp_path / "int8", resident=resident)
        assert type(ours) is hf.LlamaForCausalLM
    assert torch.equal(logits(codecllm.from_pretrained(tmp_path / "lossless")), logits(theirs))


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), "BertForMaskedLM"),
        (lambda: hf.BertModel(hf.BertConfig(**ENCODER)), "BertModel"),
        (lambda: hf.LlamaModel(hf.LlamaConfig(**tiny_models.GROUPED)), "LlamaModel"),
        (lambda: tiny_models._t5(), "T5ForConditionalGeneration"),
        (lambda: tiny_models._whisper(), "WhisperForConditionalGeneration"),
    ],
)
def test_without_architectures_the_weights_tell_the_class(tmp_path, build, kind):
    source = saved(build(), tmp_path / "source")
    edit_config(source, drop=["architectures"])
    convert(source, tmp_path / "out", "lossless")
    assert type(codecllm.from_pretrained(tmp_path / "out")).__name__ == kind


# --- Heads that the class lacks, parameters that the file lacks


def _bert_of_pretraining(folder):
    saved(hf.BertForPreTraining(hf.BertConfig(**ENCODER)), folder)
    edit_config(folder, architectures=["BertForMaskedLM"])
    return hf.BertForMaskedLM


def _bert_with_old_names(folder):
    """bert-base-uncased as published: gamma and beta, position_ids, two unused heads."""
    cls = _bert_of_pretraining(folder)

    def change(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(512)[None]

    edit_tensors(folder, change)
    return cls


def _bert_without_pooler(folder):
    saved(hf.BertModel(hf.BertConfig(**ENCODER), add_pooling_layer=False), folder)
    return hf.BertModel


def _roberta_with_pooler(folder):
    saved(hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER)), folder)

    def change(tensors):
        tensors["roberta.pooler.dense.weight"] = torch.randn(64, 64)
        tensors["roberta.pooler.dense.bias"] = torch.randn(64)

    edit_tensors(folder, change)
    return hf.RobertaForMaskedLM


def _gpt2_of_old(folder):
    """gpt2 as published: no `transformer.` prefix, attention masks as tensors."""
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=512))
    saved(model, folder)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 1024, 1024))
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, change)
    return hf.GPT2LMHeadModel


def _llama_with_value_head(folder):
    llama(folder)
    edit_config(folder, architectures=["LlamaForCausalLM"])

    def change(tensors):
        tensors["v_head.summary.weight"] = torch.randn(1, 64, dtype=torch.bfloat16)
        tensors["v_head.summary.bias"] = torch.zeros(1, dtype=torch.bfloat16)

    edit_tensors(folder, change)
    return hf.LlamaForCausalLM


def _llama_with_inv_freq(folder):
    llama(folder)

    def change(tensors):
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)

    edit_tensors(folder, change)
    return hf.LlamaForCausalLM


def _electra_with_both_heads(folder):
    config = hf.ElectraConfig(**ENCODER, embedding_size=64)
    saved(hf.ElectraForMaskedLM(config), folder)

    def change(tensors):
        tensors["discriminator_predictions.dense.weight"] = torch.randn(64, 64)

    edit_tensors(folder, change)
    return hf.ElectraForMaskedLM


LEFT_OVER = [
    _bert_of_pretraining,
    _bert_with_old_names,
    _bert_without_pooler,
    _roberta_with_pooler,
    _gpt2_of_old,
    _llama_with_value_head,
    _llama_with_inv_freq,
    _electra_with_both_heads,
]


@pytest.mark.parametrize("make", LEFT_OVER, ids=lambda make: make.__name__)
def test_heads_left_over_or_missing_are_the_sources_warning(tmp_path, caplog, make):
    source = tmp_path / "source"
    cls = make(source)
    report = convert(source, tmp_path / "out", "lossless")
    _, warnings = assert_loads_as_the_source(source, tmp_path / "out", cls, caplog)
    assert bool(warnings) == (tmp_path / "out" / LOAD_REPORT_NAME).exists()
    assert bool(warnings) == any("leaves weights over" in text for text in report.warnings)
    convert(source, tmp_path / "int8", "int8")
    for resident in RESIDENCIES:
        assert type(codecllm.from_pretrained(tmp_path / "int8", resident=resident)) is cls


def test_a_load_that_leaves_over_more_than_the_sources_is_an_error(tmp_path):
    source = tmp_path / "source"
    _bert_of_pretraining(source)
    convert(source, tmp_path / "out", "lossless")
    report = json.loads((tmp_path / "out" / LOAD_REPORT_NAME).read_text())
    assert report["unexpected"]
    report["unexpected"].pop()
    folder = copy_of(tmp_path / "out", tmp_path / "changed")
    replace_listed(folder, LOAD_REPORT_NAME, json.dumps(report).encode())
    with pytest.raises(ModelMismatchError, match=r"not in the model: cls\.seq_relationship"):
        codecllm.from_pretrained(folder)
    with pytest.raises(ModelMismatchError, match=r"not in the model: cls\.seq_relationship"):
        hf.AutoModelForMaskedLM.from_pretrained(folder)


# --- Names of the file that are not those of the class


def _old_weight_norm(tensors):
    for name in [name for name in tensors if "original" in name]:
        old = name.replace("parametrizations.weight.original0", "weight_g")
        tensors[old.replace("parametrizations.weight.original1", "weight_v")] = tensors.pop(name)


CONVOLUTIONS = {
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
AUDIO = {**ENCODER, "num_hidden_layers": 1, "vocab_size": 32, **CONVOLUTIONS}
WEIGHT_NORM = {
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**AUDIO)),
    "hubert": lambda: hf.HubertForCTC(hf.HubertConfig(**AUDIO)),
    "wavlm": lambda: hf.WavLMForCTC(hf.WavLMConfig(**AUDIO)),
    "unispeech": lambda: hf.UniSpeechForCTC(
        hf.UniSpeechConfig(**AUDIO, num_ctc_classes=32, replace_prob=0.5)
    ),
    "sew": lambda: hf.SEWForCTC(hf.SEWConfig(**AUDIO, squeeze_factor=1)),
    "encodec": lambda: hf.EncodecModel(
        hf.EncodecConfig(num_filters=4, hidden_size=32, codebook_dim=32, codebook_size=64)
    ),
}


@pytest.mark.parametrize("name", sorted(WEIGHT_NORM))
@pytest.mark.parametrize("scheme", ["lossless", "int8"])
def test_weight_norm_by_its_published_names(tmp_path, name, scheme):
    source = saved(WEIGHT_NORM[name](), tmp_path / "source")
    edit_tensors(source, _old_weight_norm)
    assert any(key.endswith("weight_v") for key in load_file(source / "model.safetensors"))
    convert(source, tmp_path / "out", scheme)
    cls = getattr(hf, json.loads((source / "config.json").read_text())["architectures"][0])
    expected = cls.from_pretrained(source).state_dict()
    dense = codecllm.from_pretrained(tmp_path / "out").state_dict()
    theirs = cls.from_pretrained(tmp_path / "out").state_dict()
    assert dense.keys() == theirs.keys() == expected.keys()
    assert all(same_bits(dense[key], theirs[key]) for key in dense)
    if scheme == "lossless":
        assert all(same_bits(dense[key], expected[key]) for key in dense)
    compressed = codecllm.from_pretrained(tmp_path / "out", resident="compressed")
    assert type(compressed) is cls


def test_the_callers_key_mapping(tmp_path):
    source = llama(tmp_path / "source")

    def rename(tensors):
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "decoder.backbone.", 1)] = tensors.pop(name)

    edit_tensors(source, rename)
    mapping = {"^decoder.backbone": "model"}
    convert(source, tmp_path / "out", "lossless")
    theirs = hf.AutoModelForCausalLM.from_pretrained(source, key_mapping=mapping)
    for model in (
        codecllm.from_pretrained(tmp_path / "out", key_mapping=mapping),
        codecllm.from_pretrained(tmp_path / "out", key_mapping=mapping, resident="compressed"),
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", key_mapping=mapping),
    ):
        assert torch.equal(logits(model), logits(theirs))


# --- What is tied


def _flip(tensors, name):
    return tensors[name].flip(0)


def _head_differs(tensors):
    tensors["lm_head.weight"] = _flip(tensors, "model.embed_tokens.weight")


def _head_alike(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def _only_the_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize(
    "change", [_head_differs, _head_alike, _only_the_head, lambda tensors: None]
)
def test_tied_embeddings_are_what_transformers_makes_of_the_file(tmp_path, change):
    source = llama(tmp_path / "source", tie_word_embeddings=True)
    edit_tensors(source, change)
    theirs = hf.AutoModelForCausalLM.from_pretrained(source)
    tied = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    convert(source, tmp_path / "lossless", "lossless")
    convert(source, tmp_path / "int8", "int8")
    dense = codecllm.from_pretrained(tmp_path / "int8")
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    compressed = codecllm.from_pretrained(tmp_path / "lossless", resident="compressed")
    automatic = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "lossless")
    for model in (codecllm.from_pretrained(tmp_path / "lossless"), compressed, automatic):
        assert torch.equal(logits(model), logits(theirs))
    for resident in ("int8", "compressed"):
        model = codecllm.from_pretrained(tmp_path / "int8", resident=resident)
        torch.testing.assert_close(logits(model), logits(dense), rtol=0.02, atol=0.02)
        same = torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert same == tied


@pytest.mark.parametrize("resident", RESIDENCIES)
def test_three_shared_embeddings_of_which_one_differs(tmp_path, resident):
    """T5 ties the embeddings of encoder, decoder and head to `shared`."""
    source = saved(tiny_models._t5(), tmp_path / "source")

    def change(tensors):
        tensors["decoder.embed_tokens.weight"] = _flip(tensors, "shared.weight")

    edit_tensors(source, change)
    theirs = hf.T5ForConditionalGeneration.from_pretrained(source)
    convert(source, tmp_path / "out", "int8" if resident == "int8" else "lossless")
    ours = codecllm.from_pretrained(tmp_path / "out", resident=resident)
    close = {"rtol": 0.05, "atol": 0.05} if resident == "int8" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(ours), logits(theirs), **close)


@pytest.mark.parametrize("resident", RESIDENCIES)
def test_a_tied_head_of_an_encoder_that_differs(tmp_path, resident):
    source = saved(hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), tmp_path / "source")

    def change(tensors):
        head = _flip(tensors, "bert.embeddings.word_embeddings.weight")
        tensors["cls.predictions.decoder.weight"] = head

    edit_tensors(source, change)
    theirs = hf.BertForMaskedLM.from_pretrained(source)
    convert(source, tmp_path / "out", "int8" if resident == "int8" else "lossless")
    ours = codecllm.from_pretrained(tmp_path / "out", resident=resident)
    close = {"rtol": 0.05, "atol": 0.05} if resident == "int8" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(logits(ours), logits(theirs), **close)


# --- What stays in float32

KEPT = {
    "t5": tiny_models._t5,
    "mt5": lambda: hf.MT5ForConditionalGeneration(
        hf.MT5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=512)
    ),
    "umt5": lambda: hf.UMT5ForConditionalGeneration(
        hf.UMT5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=512)
    ),
    "deepseek_v3": tiny_models._deepseek,
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, context_length=64)
    ),
    "mamba": tiny_models._mamba,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(KEPT))
def test_dtypes_are_those_of_the_sources_load(tmp_path, name, dtype):
    source = saved(KEPT[name](), tmp_path / "source")
    cls = getattr(hf, json.loads((source / "config.json").read_text())["architectures"][0])
    theirs = cls.from_pretrained(source, dtype=dtype)
    expected = {key: value.dtype for key, value in theirs.state_dict().items()}
    if name == "t5" and dtype == torch.float16:
        assert torch.float32 in expected.values()
    convert(source, tmp_path / "out", "int8")
    for load in (codecllm.from_pretrained, cls.from_pretrained):
        model = load(tmp_path / "out", dtype=dtype)
        assert {key: value.dtype for key, value in model.state_dict().items()} == expected
    for resident in ("int8", "compressed"):
        model = codecllm.from_pretrained(tmp_path / "out", dtype=dtype, resident=resident)
        for key, kept in expected.items():
            owner, _, last = key.rpartition(".")
            assert getattr(model.get_submodule(owner), last).dtype == kept, key


def test_activations_beyond_float16_stay_right_in_every_residency(tmp_path):
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, vocab_size=512,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            factor = 30 if ".wi." in name else 100 if ".wo." in name else 1
            parameter.copy_(torch.randn_like(parameter) * 0.3 * factor)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "int8")
    dense = codecllm.from_pretrained(tmp_path / "out", dtype=torch.float16)
    expected = logits(dense)
    automatic = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert torch.equal(logits(automatic), expected)
    for resident in ("int8", "compressed"):
        model = codecllm.from_pretrained(tmp_path / "out", dtype=torch.float16, resident=resident)
        torch.testing.assert_close(logits(model), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_config_without_dtype_takes_that_of_the_file(tmp_path, dtype):
    source = tiny_models.llama(tmp_path / "source", dtype=dtype)
    edit_config(source, drop=["dtype", "torch_dtype"])
    convert(source, tmp_path / "out", "int8")
    theirs = hf.AutoModelForCausalLM.from_pretrained(source)
    assert theirs.dtype == dtype
    assert codecllm.from_pretrained(tmp_path / "out").dtype == dtype
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


# --- Generation defaults


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({}, {"do_sample": False, "temperature": 0.9, "top_p": 0.6}),
        ({}, {"eos_token_id": [1, 2], "max_new_tokens": 7}),
        ({"temperature": 0.4, "do_sample": True, "num_beams": 3}, None),
        ({"forced_bos_token_id": 5, "max_length": 30}, None),
        ({}, None),
    ],
)
def test_generation_defaults_are_the_sources(tmp_path, config, generation):
    source = llama(tmp_path / "source")
    edit_config(source, **config)
    (source / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    convert(source, tmp_path / "out", "int8")
    theirs = hf.AutoModelForCausalLM.from_pretrained(source).generation_config
    for resident in RESIDENCIES:
        ours = codecllm.from_pretrained(tmp_path / "out", resident=resident)
        assert ours.generation_config.to_dict() == theirs.to_dict()
    automatic = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert automatic.generation_config.to_dict() == theirs.to_dict()
    automatic.save_pretrained(tmp_path / "saved")


# --- The same calls


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("llama", "AutoModel"),
        ("llama", "AutoModelForCausalLM"),
        ("llama", "AutoModelForSequenceClassification"),
        ("llama", "AutoModelForTokenClassification"),
        ("bert", "AutoModelForMaskedLM"),
    ],
)
@pytest.mark.parametrize("resident", RESIDENCIES)
def test_task_classes_of_the_caller(container, name, auto, resident):
    folder, cls = container(name, "int8"), getattr(hf, auto)
    torch.manual_seed(3)
    theirs = cls.from_pretrained(folder, num_labels=5)
    torch.manual_seed(3)
    ours = codecllm.from_pretrained(folder, auto_class=cls, num_labels=5, resident=resident)
    assert type(ours) is type(theirs)
    assert ours.config.num_labels == 5
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.02, atol=0.02)


def test_arguments_of_transformers_are_taken(container):
    folder = container("llama", "int8")
    model, info = codecllm.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model) is hf.LlamaForCausalLM
    model = codecllm.from_pretrained(folder, attn_implementation="eager", use_cache=False)
    assert model.config._attn_implementation == "eager"
    assert not model.config.use_cache
    config = hf.AutoConfig.from_pretrained(folder)
    config.use_cache = False
    assert not codecllm.from_pretrained(folder, config=config).config.use_cache
    for trust in (False, True):  # this container lists no code, so there is nothing to run
        model = codecllm.from_pretrained(folder, trust_remote_code=trust)
        assert type(model) is hf.LlamaForCausalLM
    of_weights = ("state_dict", "quantization_config", "gguf_file", "subfolder", "variant")
    of_ours = ("return_unused_kwargs", "pretrained_model_name_or_path", "model", "run_code")
    for name in (*of_weights, *of_ours, "config_class", "transformers_weights"):
        with pytest.raises(UsageError, match=f"takes no {name}$"):
            codecllm.from_pretrained(folder, **{name: "x"})


def test_ignore_mismatched_sizes_is_the_callers_word(container):
    folder = container("llama", "int8")
    with pytest.raises(ModelMismatchError, match="mis-shaped"):
        codecllm.from_pretrained(folder, vocab_size=300)
    model = codecllm.from_pretrained(folder, vocab_size=300, ignore_mismatched_sizes=True)
    assert model.config.vocab_size == 300


def test_pipeline(tmp_path, tiny):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    source = copy_of(tiny("llama"), tmp_path / "source")
    words = WordLevel({f"t{number}": number for number in range(512)}, unk_token="t0")
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0")
    fast.save_pretrained(source)
    convert(source, tmp_path / "out", "lossless")
    options = {"max_new_tokens": 5, "do_sample": False}
    theirs = hf.pipeline("text-generation", model=str(source))("t5", **options)
    assert hf.pipeline("text-generation", model=str(tmp_path / "out"))("t5", **options) == theirs
