"""`from_pretrained` gives the weights and logits of the reference, in each residency."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import torch
import transformers

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import (
    ChecksumError,
    HubError,
    ModelMismatchError,
    NotAContainerError,
    UnsupportedEnvironmentError,
    UsageError,
)
from codecllm.formats.manifest.manifest import ORIGINAL_KEY
from codecllm.formats.reference import read_tensor_bytes
from codecllm.loader import from_pretrained, stream_tensors
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.resident import int8_matmul
from codecllm.loader.resident.coded_weight import CodedWeight
from codecllm.loader.torch_tensors import TORCH_DTYPES
from tests import tampering
from tests.integration import tiny_models
from tests.integration.outputs import coded_weights, in_experts_loop, logits, same_bits

NAMES = sorted(tiny_models.MAKERS)
FUSED = {"qwen3_moe", "mixtral", "deepseek_v3", "llava", "gpt_neox"}
"""Models whose parameters have other names or shapes than the tensors of their checkpoints."""


@pytest.mark.parametrize("name", NAMES)
def test_lossless_dense_model_is_the_source_bit_for_bit(tiny, container, name):
    source, model = load_plain(tiny(name)), from_pretrained(container(name, "lossless"))
    assert type(model) is type(source)
    assert not model.training
    theirs, ours = source.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(same_bits(theirs[key], ours[key]) for key in theirs)
    assert torch.equal(logits(source), logits(model))


@pytest.mark.parametrize("name", sorted(set(NAMES) - FUSED))
def test_int8_dense_weights_are_those_of_the_reference(container, name):
    folder = container(name, "int8")
    ours = from_pretrained(folder).state_dict()
    compared = 0
    with Container(folder) as opened:
        for record in opened.manifest.tensors:
            key = next(
                (key for key in ours if key == record.name or key.endswith("." + record.name)), None
            )
            assert key is not None, record.name
            value = ours[key].to(
                TORCH_DTYPES[record.dtype]
            )  # older transformers keep gpt_oss's norms in float32
            assert value.contiguous().view(torch.uint8).numpy().tobytes() == read_tensor_bytes(
                opened, record.name
            )
            compared += record.scheme == "int8"
    assert compared > 5


@pytest.mark.parametrize("name", NAMES)
def test_int8_resident_gives_the_logits_of_dense(container, name, monkeypatch):
    folder = container(name, "int8")
    dense, resident = from_pretrained(folder), from_pretrained(folder, resident="int8")
    forms = [weight.form for weight in coded_weights(resident).values()]
    assert forms
    for form in forms:
        # Of a stack of experts too, by the names of its parts' tensors.
        held = form.held_tensors()
        assert {tensor.dtype for name, tensor in held.items() if "codes" in name} == {torch.int8}
        assert {tensor.dtype for name, tensor in held.items() if "scale" in name} == {torch.float32}
    expected, quick = logits(in_experts_loop(dense)), logits(resident)
    assert (quick - expected).norm() <= 0.02 * expected.norm()
    monkeypatch.setattr(int8_matmul, "PACKED_ROWS", 0)
    assert torch.equal(logits(resident), expected)


def test_int8_resident_tied_embedding_shares_its_codes(container):
    model = from_pretrained(container("llama", "int8"), resident="int8")
    assert isinstance(model.lm_head.weight, CodedWeight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_int8_resident_halves_the_bytes_of_the_weights(container):
    folder = container("llama", "int8")
    sizes = {}
    for how in ("dense", "int8"):
        model = from_pretrained(folder, resident=how)
        sizes[how] = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert sizes[how] == model.get_memory_footprint()
    assert sizes["int8"] < 0.54 * sizes["dense"]


def test_weight_of_an_int8_module_is_the_dequantized_one(container):
    dense, resident = (
        from_pretrained(container("llama", "int8"), resident=how) for how in ("dense", "int8")
    )
    coded = coded_weights(resident)
    assert len(coded) == 16
    for name, weight in coded.items():
        assert same_bits(weight, dense.get_parameter(name))


def test_int8_resident_moves_to_another_dtype_without_touching_scales(container):
    folder = container("llama", "int8")
    model = from_pretrained(folder, resident="int8").to(torch.float32)
    assert model.lm_head.weight.form.matrix.scale.dtype == torch.float32
    torch.testing.assert_close(
        logits(model), logits(from_pretrained(folder, dtype=torch.float32)), rtol=0, atol=0
    )


def test_dense_tied_weights_are_one_tensor(container):
    for scheme in ("lossless", "int8"):
        model = from_pretrained(container("llama", scheme))
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_equal_but_untied_weights_get_memory_of_their_own(tmp_path):
    config = transformers.LlamaConfig(**tiny_models.GROUPED, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.to(torch.float32).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", scheme="lossless")
    assert [record.scheme for record in report.manifest.tensors].count("alias") == 1
    loaded = from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("load", [from_pretrained, transformers.AutoModel.from_pretrained])
def test_equal_buffers_get_memory_of_their_own(tmp_path, load):
    """Codebooks of an audio codec are alike before training, and change in place while it runs."""
    config = transformers.EncodecConfig(
        num_filters=2,
        hidden_size=32,
        codebook_dim=32,
        target_bandwidths=[120.0],
        upsampling_ratios=[2, 2],
        num_lstm_layers=1,
    )
    transformers.EncodecModel(config).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    assert "alias" in {record.scheme for record in report.manifest.tensors}
    model = load(tmp_path / "out")
    codebooks = [
        value
        for name, value in model.named_buffers(remove_duplicate=False)
        if name.endswith((".embed", ".embed_avg"))
    ]
    assert len({value.data_ptr() for value in codebooks}) == len(codebooks) > 2
    codebooks[0].add_(1.0)
    assert not any(value.any() for value in codebooks[1:])
    assert (model.quantizer.layers[0].codebook.embed == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "bfloat16", "auto", None])
def test_dtype_is_that_of_the_caller_rounded_once(container, dtype):
    folder = container("llama", "int8")
    wanted = {"bfloat16": torch.bfloat16, "auto": torch.bfloat16, None: torch.bfloat16}.get(
        dtype, dtype
    )
    model = from_pretrained(folder, dtype=dtype)
    assert model.dtype == wanted
    name = "model.layers.0.mlp.up_proj.weight"
    with Container(folder) as opened:
        from codecllm.formats.reference import read_codes

        stored = opened.tensor(name)
        exact = read_codes(stored).astype(np.float32) * stored.scales[:, None]
    assert torch.equal(model.get_parameter(name), torch.from_numpy(exact).to(wanted))


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_loading_in_inference_mode_gives_plain_tensors(container, scheme, dtype):
    """Threads write to the caller's tensors, which they may not if these are inference tensors."""
    folder = container("llama", scheme)
    expected = from_pretrained(folder, dtype=dtype).state_dict()
    with torch.inference_mode():
        model = from_pretrained(folder, dtype=dtype, workers=2)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    model.train()
    model(torch.arange(8)[None]).logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sharded_source_and_container(tmp_path):
    source = tiny_models.llama(tmp_path / "source", max_shard_size="60KB", tied=False)
    report = convert(source, tmp_path / "out", scheme="lossless", max_shard_bytes=60_000)
    assert len(report.manifest.shards) > 2
    assert torch.equal(logits(from_pretrained(tmp_path / "out")), logits(load_plain(source)))


def test_generation_config_comes_from_the_container(tmp_path, tiny):
    folder = tmp_path / "source"
    tampering.copy_of(tiny("llama"), folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "max_new_tokens": 3})
    )
    convert(folder, tmp_path / "out", scheme="lossless")
    assert from_pretrained(tmp_path / "out").generation_config.eos_token_id == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "not in the model: model.layers.1."),
        ({"vocab_size": 300}, "mis-shaped: "),
    ],
)
def test_tensors_that_do_not_fit_the_class_are_an_error(tmp_path, tiny, change, words):
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    convert(source, tmp_path / "out", scheme="lossless")
    with pytest.raises(ModelMismatchError, match=words):
        from_pretrained(tmp_path / "out")


def test_untied_config_without_lm_head_is_an_error(tmp_path, tiny):
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    convert(source, tmp_path / "out", scheme="lossless")
    with pytest.raises(ModelMismatchError, match=r"missing: lm_head\.weight"):
        from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("resident", ["dense", "int8"])
def test_damaged_chunk_is_named_and_nothing_is_returned(tmp_path, container, resident):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, "model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(ChecksumError) as caught:
        from_pretrained(folder, resident=resident)
    assert (caught.value.tensor, caught.value.chunk) == ("model.layers.1.mlp.down_proj.weight", 0)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_side_file_is_refused(tmp_path, container, name):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    tampering.flip_bit(folder / name, 5)
    with pytest.raises(ChecksumError, match=name):
        from_pretrained(folder)


def test_damaged_plain_tensor_is_refused(tmp_path, container):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    with Container(folder) as opened:
        plain = opened.tensor("model.norm.weight")
        place = (folder / plain.file.name, plain.offset)
    tampering.flip_bit(*place)
    with pytest.raises(ChecksumError, match=r"model\.norm\.weight"):
        from_pretrained(folder)


def test_pinned_manifest(container):
    folder = container("llama", "int8")
    with Container(folder) as opened:
        pinned = opened.manifest_sha256
    assert from_pretrained(folder, expected_manifest_sha256=pinned) is not None
    with pytest.raises(ChecksumError, match="not the expected one"):
        from_pretrained(folder, expected_manifest_sha256="0" * 64)


def test_unknown_model_type_is_an_unsupported_environment(tmp_path, tiny):
    source = tampering.copy_of(tiny("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    changed = {"architectures": ["NoSuchModel"], "model_type": "no_such_type"}
    (source / "config.json").write_text(json.dumps({**config, **changed}))
    convert(source, tmp_path / "out", scheme="lossless")
    with pytest.raises(UnsupportedEnvironmentError, match="no_such_type"):
        from_pretrained(tmp_path / "out")


WRONG = {
    "workers": [0, -1, 10**6, 10**30, 1.5, float("nan"), "2", b"x", True, object()],
    "expected_manifest_sha256": [5, 1.5, b"x", [], object()],
    "auto_class": [5, "LlamaForCausalLM", object(), transformers.LlamaConfig, lambda: 0],
    "progress": ["yes", 5, [1], object()],
    "config": [5, "config.json", {}, object()],
}


@pytest.mark.parametrize(("name", "values"), WRONG.items(), ids=WRONG)
def test_an_argument_of_another_kind_is_an_error(container, name, values):
    for value in values:
        with pytest.raises(UsageError, match="manifest" if "manifest" in name else name):
            from_pretrained(container("llama", "int8"), **{name: value})
    if name == "workers":
        with pytest.raises(UsageError, match="workers"):
            convert("anything", "anywhere", workers=1.5)
        with pytest.raises(UsageError, match="workers"):
            list(stream_tensors(container("llama", "int8"), workers=1.5))


@pytest.mark.parametrize("limits", [{"x": 1}, {"cpu": "1ZB"}, 5])
def test_memory_that_accelerate_does_not_take_is_an_error(container, limits, tmp_path):
    with pytest.raises(UsageError, match="max_memory"):
        from_pretrained(
            container("llama", "int8"),
            resident="int8",
            device_map="auto",
            max_memory=limits,
            offload_folder=tmp_path,
        )


def test_usage_errors(container, tmp_path):
    folder = container("llama", "lossless")
    with pytest.raises(UsageError, match="holds none"):
        from_pretrained(folder, resident="int8")
    with pytest.raises(UsageError, match="resident"):
        from_pretrained(folder, resident="float8")
    with pytest.raises(UsageError, match="state_dict"):
        from_pretrained(folder, state_dict={})
    with pytest.raises(UsageError, match="float dtype"):
        from_pretrained(folder, dtype=torch.int8)
    with pytest.raises(NotAContainerError):
        from_pretrained(tmp_path)
    with pytest.raises((UsageError, HubError)):
        from_pretrained(tmp_path / "nothing here")


def test_a_plain_config_block_is_not_left_in_a_dense_model(container):
    assert not hasattr(from_pretrained(container("llama", "int8")).config, "quantization_config")


def test_loading_leaves_threads_and_their_number_alone(container):
    before = torch.get_num_threads()
    alive = set(threading.enumerate())
    from_pretrained(container("llama", "int8"), workers=4)
    assert torch.get_num_threads() == before
    assert [
        thread.name
        for thread in set(threading.enumerate()) - alive
        if thread.name.startswith("codecllm")
    ] == []


@pytest.mark.parametrize("resident", ["int8", "compressed"])
def test_a_coded_model_refuses_to_be_saved_and_says_what_to_do(tmp_path, container, resident):
    model = from_pretrained(container("llama", "int8"), resident=resident)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(UsageError, match="codecllm convert"):
            one.save_pretrained(tmp_path / "plain")
    assert not list(tmp_path.glob("plain/*.safetensors"))


def test_a_dense_model_is_saved_as_a_plain_one(tmp_path, container):
    model = from_pretrained(container("llama", "int8"))
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load_plain(tmp_path / "plain")), logits(model))


@pytest.mark.parametrize("dtype", ["auto", "float16", torch.float32, None])
def test_the_older_name_of_dtype_means_the_same(container, dtype):
    folder = container("llama", "int8")
    models = [from_pretrained(folder, **{name: dtype}) for name in ("dtype", "torch_dtype")]
    expected, got = (model.state_dict() for model in models)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert {value.dtype for value in got.values()} == {value.dtype for value in expected.values()}
    both = from_pretrained(folder, dtype=torch.float16, torch_dtype=torch.float32)
    assert both.dtype == torch.float16
    with pytest.raises(UsageError, match="not a value of dtype"):
        from_pretrained(folder, torch_dtype="int8")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device")
def test_a_device_that_a_quantizer_chooses_and_this_machine_lacks(tmp_path, container):
    folder = tampering.copy_of(container("llama", "lossless"), tmp_path / "c")
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"][ORIGINAL_KEY] = {"quant_method": "metal"}
    tampering.replace_listed(folder, "config.json", json.dumps(config).encode())
    with pytest.raises(UnsupportedEnvironmentError, match=r"cannot be put in its place.*mps"):
        from_pretrained(folder)
