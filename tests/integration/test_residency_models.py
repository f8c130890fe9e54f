"""Loaded models in the hands of transformers: resized, tied, copied, sent, counted and saved."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers

from codecllm.converter import convert
from codecllm.formats.errors import UsageError
from codecllm.loader import from_pretrained
from codecllm.loader.hf.quantizer import QUANTIZED_MARK
from codecllm.loader.resident.coded_weight import CodedWeight
from tests.integration import architectures
from tests.integration.architectures import SEQUENCE
from tests.integration.outputs import coded_weights, logits, same_bits

RESIDENTS = ("dense", "int8", "compressed")
CODED = ("int8", "compressed")
NEW_IDS = torch.tensor([[519, 3, 515]])


@pytest.mark.parametrize("resident", CODED)
def test_sizes_are_true(container, resident):
    dense = from_pretrained(container("llama", "int8"))
    model = from_pretrained(container("llama", "int8"), resident=resident)
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(
        exclude_embeddings=True
    )
    assert (model.dtype, model.device) == (dense.dtype, dense.device)
    coded = dict.fromkeys(coded_weights(model).values())
    plain = [p for p in (*model.parameters(), *model.buffers()) if p not in coded]
    held = sum(weight.form.nbytes for weight in coded) + sum(p.nbytes for p in plain)
    assert model.get_memory_footprint() == pytest.approx(held)
    assert held < 0.6 * dense.get_memory_footprint()
    assert model.get_input_embeddings().weight.shape == (512, 64)


@pytest.mark.parametrize("name", ["llama", "llama_untied"])
def test_embeddings_are_resized_on_both_ends(container, name):
    outputs = {}
    for resident in RESIDENTS:
        model = from_pretrained(container(name, "int8"), resident=resident, dtype=torch.float32)
        torch.manual_seed(0)
        model.resize_token_embeddings(520)
        assert model.config.vocab_size == 520
        assert model.get_input_embeddings().weight.shape == (520, 64)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == (name == "llama")
        outputs[resident] = model(NEW_IDS).logits.detach()
        assert outputs[resident].shape == (1, 3, 520)
        if resident != "dense":
            assert len(coded_weights(model)) == 14
        model.resize_token_embeddings(300)
        assert model(NEW_IDS % 300).logits.shape == (1, 3, 300)
    for resident in CODED:
        assert torch.equal(outputs[resident], outputs["dense"])


@pytest.mark.parametrize("resident", CODED)
def test_tied_weights_stay_tied(container, resident):
    model = from_pretrained(container("llama", "int8"), resident=resident)
    expected = logits(model)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        model.lm_head.weight[5] = 1
    assert (model.model.embed_tokens.weight[5] == 1).all()
    assert type(model.model.embed_tokens.weight) is torch.nn.Parameter
    model.model.embed_tokens.requires_grad_(True)
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("resident", RESIDENTS)
def test_copies_and_pickles_work(container, resident):
    model = from_pretrained(container("llama", "int8"), resident=resident)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(again), expected)
        assert coded_weights(again).keys() == coded_weights(model).keys()
        assert again.get_memory_footprint() == model.get_memory_footprint()
        assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("resident", CODED)
def test_state_dicts_go_from_and_to_plain_models(container, resident):
    folder = container("llama", "int8")
    dense, model = from_pretrained(folder), from_pretrained(folder, resident=resident)
    assert model.state_dict().keys() == dense.state_dict().keys()
    plain = copy.deepcopy(dense)
    with torch.no_grad():
        plain.lm_head.weight.zero_()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), logits(dense))
    with torch.no_grad():
        for value in plain.parameters():
            value.mul_(0.5)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("resident", CODED)
def test_saving_the_model_is_one_clear_error(tmp_path, container, resident):
    model = from_pretrained(container("llama", "int8"), resident=resident)
    with pytest.raises(UsageError, match=r"model\.dequantize\(\)"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="half"):
        model.half()


@pytest.mark.parametrize("resident", CODED)
def test_saving_what_contains_coded_weights_is_the_same_error(tmp_path, container, resident):
    """A part of the model, and a model that has it as a part."""
    llama = from_pretrained(container("llama", "int8"), resident=resident)
    bert = from_pretrained(
        container("bert", "int8"), resident=resident, auto_class=transformers.AutoModel
    )
    gpt2 = from_pretrained(container("gpt2", "int8"), resident=resident)
    whole = transformers.EncoderDecoderModel(encoder=bert, decoder=gpt2)
    for model in (llama.model, whole):
        with pytest.raises(UsageError, match=r"model\.dequantize\(\)"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resident", ["dense", *CODED])
def test_a_plain_part_is_saved_as_a_plain_model(tmp_path, container, resident):
    """The config of T5's encoder is a copy of the model's, quantization block included."""
    model = from_pretrained(container("t5", "int8"), resident=resident)
    if resident != "dense":
        model.dequantize()
    model.encoder.save_pretrained(tmp_path / "encoder")
    assert "codecllm" not in (tmp_path / "encoder" / "config.json").read_text()
    again = type(model.encoder).from_pretrained(tmp_path / "encoder").state_dict()
    values = model.encoder.state_dict()
    assert all(same_bits(again[key], value) for key, value in values.items())


def test_a_new_model_of_a_containers_config_is_saved_as_a_plain_one(tmp_path, container):
    config = transformers.AutoConfig.from_pretrained(container("llama", "int8"))
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "new")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
@pytest.mark.parametrize("resident", CODED)
def test_dequantize_gives_the_dense_model(tmp_path, container, name, resident):
    folder = container(name, "int8")
    dense, model = from_pretrained(folder), from_pretrained(folder, resident=resident)
    assert model.dequantize() is model
    assert not coded_weights(model)
    assert model.codecllm_resident.resident == "dense"
    assert all(parameter.requires_grad for parameter in model.parameters())
    values = model.state_dict()
    assert values.keys() == dense.state_dict().keys()
    assert all(same_bits(values[key], value) for key, value in dense.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").state_dict()
    assert all(same_bits(again[key], value) for key, value in values.items())
    with pytest.raises(ValueError, match="quantize"):
        model.dequantize()


def test_dequantize_to_another_dtype_rounds_once(container):
    wide = from_pretrained(container("llama", "int8"), dtype=torch.float32)
    model = from_pretrained(container("llama", "int8"), resident="int8")
    model.dequantize(torch.float32)
    assert torch.equal(model.lm_head.weight, wide.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


READ = """
import sys, torch
values = torch.load(sys.argv[1], weights_only=True)
assert "codecllm" not in sys.modules
assert {type(value) for value in values.values()} == {torch.Tensor}
addresses = [values[key].data_ptr() for key in ("lm_head.weight", "model.embed_tokens.weight")]
assert addresses[0] == addresses[1]
"""


@pytest.mark.parametrize("resident", CODED)
def test_the_file_of_a_state_dict_is_that_of_a_plain_model(tmp_path, container, resident):
    dense = from_pretrained(container("llama", "int8"))
    model = from_pretrained(container("llama", "int8"), resident=resident)
    files = []
    for name, each in (("dense.pt", dense), ("coded.pt", model)):
        torch.save(each.state_dict(), tmp_path / name)
        files.append(torch.load(tmp_path / name, weights_only=True))
        subprocess.run([sys.executable, "-c", READ, tmp_path / name], check=True)
    assert files[0].keys() == files[1].keys()
    assert all(same_bits(files[1][key], value) for key, value in files[0].items())
    sizes = [(tmp_path / name).stat().st_size for name in ("dense.pt", "coded.pt")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert len(coded_weights(model)) == 16
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    plain = copy.deepcopy(dense)
    with torch.no_grad():
        plain.lm_head.weight.zero_()
    safetensors.torch.load_model(plain, tmp_path / "model.safetensors")
    assert torch.equal(logits(plain), logits(dense))


@pytest.mark.parametrize("resident", CODED)
def test_the_first_weights_of_a_model_can_be_initialised_again(container, resident):
    model = from_pretrained(container("llama", "int8"), resident=resident)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert type(layer.weight) is torch.nn.Parameter
    assert len(coded_weights(model)) == 15
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("resident", CODED)
def test_training_all_weights_is_training_a_dense_model(container, resident):
    losses = {}
    for how in ("dense", resident):
        model = from_pretrained(container("llama", "int8"), resident=how, dtype=torch.float32)
        model.requires_grad_(True)
        assert not coded_weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = torch.arange(10, 26)[None]
        losses[how] = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[how].append(loss.item())
    assert losses[resident] == losses["dense"]
    assert losses["dense"][2] < losses["dense"][0]


def test_conv1d_and_scaled_embeddings_stay_coded(tmp_path):
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=256)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    scaled = transformers.Gemma2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
    )
    transformers.Gemma2ForCausalLM(scaled).save_pretrained(tmp_path / "gemma2")
    for name, part in (("gpt2", "c_attn"), ("gemma2", "embed_tokens")):
        convert(tmp_path / name, tmp_path / f"{name}_c", scheme="lossless")
        dense = from_pretrained(tmp_path / f"{name}_c")
        model = from_pretrained(tmp_path / f"{name}_c", resident="compressed")
        assert any(part in weight for weight in coded_weights(model))
        ids = torch.arange(3, 19).reshape(2, 8)
        assert torch.equal(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("resident", CODED)
def test_untied_equal_weights_are_weights_of_their_own(tmp_path, resident):
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=256,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "c", scheme="int8", include=("*",))
    loaded = from_pretrained(tmp_path / "c", resident=resident)
    head, table = loaded.lm_head.weight, loaded.model.embed_tokens.weight
    assert isinstance(head, CodedWeight) and isinstance(table, CodedWeight)
    assert head.form is table.form
    with torch.no_grad():
        head.zero_()
    assert table.any()


@pytest.mark.parametrize("resident", CODED)
def test_a_buffer_of_two_dimensions_stays_a_buffer(tmp_path, resident):
    """BART, Marian, Pegasus and others keep a bias of the logits as a buffer, [1, vocabulary]."""
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQUENCE))
    torch.manual_seed(0)
    model.final_logits_bias += torch.randn(1, 512)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "c", scheme="int8", include=("*",))
    dense, model = (from_pretrained(tmp_path / "c", resident=how) for how in ("dense", resident))
    assert dict(model.named_buffers()).keys() == dict(dense.named_buffers()).keys()
    assert torch.equal(model.final_logits_bias, dense.final_logits_bias)
    assert type(model.final_logits_bias) is torch.Tensor
    assert model.num_parameters() == dense.num_parameters()
    for each in (dense, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(520)
    torch.testing.assert_close(logits(model), logits(dense))


def test_strided_inputs_give_the_bits_of_a_frozen_dense_layer(container):
    dense, model = (
        from_pretrained(container("llama", "lossless"), resident=how, dtype=torch.float32)
        for how in ("dense", "compressed")
    )
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 3, 64, generator=generator).transpose(0, 1)
    assert not inputs.is_contiguous()
    dense.requires_grad_(False)
    for name in ("up_proj", "gate_proj"):
        expected = dense.model.layers[0].mlp.get_submodule(name)(inputs)
        assert torch.equal(model.model.layers[0].mlp.get_submodule(name)(inputs), expected)


def _detr():
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 64], depths=[1] * 4, out_features=["stage4"]
    )
    kinds = {key: value for key, value in SEQUENCE.items() if "layers" in key or "dim" in key}
    config = transformers.DetrConfig(
        d_model=64, num_queries=8, backbone_config=backbone, **kinds,
        use_timm_backbone=False, use_pretrained_backbone=False,
        encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def _segformer():
    config = transformers.SegformerConfig(
        hidden_sizes=[32, 32, 64, 64], depths=[1] * 4, decoder_hidden_size=64
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        vocab_size=512, lru_width=64, block_types=["recurrent", "attention"],
    )  # fmt: skip
    return transformers.RecurrentGemmaForCausalLM(config)


@pytest.mark.parametrize("make", [_detr, _segformer, _recurrent_gemma])
def test_models_with_transposed_inputs(tmp_path, make):
    torch.manual_seed(0)
    source = make().to(torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "c", scheme="int8", include=("*",))
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).bfloat16()
    text = {"input_ids": torch.tensor([[1, 5, 9]]), "use_cache": False}
    inputs = text if make is _recurrent_gemma else {"pixel_values": pixels}
    outputs = {}
    for resident in RESIDENTS:
        model = from_pretrained(tmp_path / "c", auto_class=type(source), resident=resident)
        with torch.no_grad():
            outputs[resident] = model(**inputs).logits.float()
        assert resident == "dense" or coded_weights(model)
    assert torch.equal(outputs["compressed"], outputs["dense"])
    difference = (outputs["int8"] - outputs["dense"]).abs().max()
    assert difference <= 0.06 * outputs["dense"].abs().max()


@pytest.mark.parametrize("resident", RESIDENTS)
def test_inputs_that_torch_refuses_are_refused(container, resident):
    """Such as the hidden states that an embedding in the place of a head gets."""
    model = from_pretrained(container("llama", "int8"), resident=resident)
    table, layer = model.get_input_embeddings(), model.model.layers[0].mlp.up_proj
    for ids in ([[1.7]], [[True]]):
        with pytest.raises(RuntimeError):
            table(torch.tensor(ids))
    with pytest.raises(RuntimeError):
        table(torch.tensor([[5]], dtype=torch.uint8))
    assert table(torch.tensor([[5]], dtype=torch.int32)).shape == (1, 1, 64)
    for padding in (700, -700):
        with pytest.raises(AssertionError):
            torch.nn.functional.embedding(torch.tensor([1]), table.weight, padding_idx=padding)
    whole = torch.ones(2, 64, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError):
        layer(whole)


@pytest.mark.skipif(
    not hasattr(transformers, "NomicBertConfig"), reason="this transformers lacks NomicBert"
)
@pytest.mark.parametrize("resident", CODED)
def test_a_class_that_cuts_a_tensor_of_the_file_into_several_weights(tmp_path, resident):
    """Queries, keys and values lie in one tensor: they become plain, and the rest stays coded."""
    config = transformers.NomicBertConfig(
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 64},
    )
    transformers.NomicBertModel(config).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", scheme="int8", include=("*",))
    names = {record.name for record in report.manifest.tensors}
    model = from_pretrained(tmp_path / "out", resident=resident)
    dense = from_pretrained(tmp_path / "out").state_dict()
    assert names != dense.keys()
    assert coded_weights(model)
    assert all(same_bits(value + 0, dense[key]) for key, value in model.state_dict().items())
    cut = [key for key, value in model.named_parameters() if not isinstance(value, CodedWeight)]
    assert any(key.endswith("q_proj.weight") for key in cut)


@pytest.mark.parametrize("name", ["falcon_mamba", "jamba"])
def test_classes_that_look_whether_weights_are_quantized(tmp_path, name):
    """They would compute with the bias taken off again: rounded twice."""
    source = architectures.make(name, tmp_path / "source")
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "bf16")
    convert(tmp_path / "bf16", tmp_path / "out", scheme="lossless")
    model = from_pretrained(tmp_path / "out", resident="compressed")
    assert coded_weights(model)
    assert not hasattr(model.config, QUANTIZED_MARK)
    with torch.no_grad():
        mamba = next(part for part in plain.modules() if hasattr(part, "dt_proj"))
        again = next(part for part in model.modules() if hasattr(part, "dt_proj"))
        hidden = torch.randn(1, 7, plain.config.hidden_size, dtype=torch.bfloat16)
        assert torch.equal(again(hidden), mamba(hidden))
