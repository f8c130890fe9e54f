"""Containers that transformers loads by itself after `import codecllm.loader`."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.formats.errors import ChecksumError, NotAContainerError
from codecllm.loader import from_pretrained
from tests import tampering
from tests.integration import tiny_models
from tests.integration.outputs import logits, same_bits

NAMES = sorted(tiny_models.MAKERS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["lossless", "int8"])
def test_transformers_loads_a_container_by_itself(tmp_path, container, name, scheme):
    ours = from_pretrained(container(name, scheme))
    theirs = type(ours).from_pretrained(container(name, scheme))
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(same_bits(mine[key], other[key]) for key in mine)
    assert torch.equal(logits(ours), logits(theirs))
    assert not any(value.is_meta for value in other.values())
    assert not hasattr(theirs.config, "quantization_config")
    theirs.save_pretrained(tmp_path / "plain")
    again = type(ours).from_pretrained(tmp_path / "plain").state_dict()
    assert all(same_bits(mine[key], again[key]) for key in mine)


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel"])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float32}, {"device_map": "auto"}, {"device_map": "cpu"}]
)
def test_auto_classes_load_a_container(container, auto, options):
    model = getattr(transformers, auto).from_pretrained(container("llama", "int8"), **options)
    reference = from_pretrained(container("llama", "int8"), dtype=options.get("dtype"))
    assert model.dtype == reference.dtype
    base = reference if auto == "AutoModelForCausalLM" else reference.model
    assert all(
        same_bits(value, base.state_dict()[key]) for key, value in model.state_dict().items()
    )


def test_plain_weights_under_a_containers_config_are_an_error(tmp_path, container):
    """Somebody put both into one folder."""
    folder = container("llama", "int8")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    with pytest.raises(NotAContainerError, match="take quantization_config out"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "c", scheme="lossless")
    assert torch.equal(logits(from_pretrained(tmp_path / "c")), logits(model.eval()))


def test_transformers_alone_stops_at_a_damaged_chunk(tmp_path, container):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, "model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(ChecksumError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_alone_stops_at_a_damaged_plain_tensor(tmp_path, container):
    folder = tampering.copy_of(container("llama", "int8"), tmp_path / "c")
    with Container(folder) as opened:
        plain = opened.tensor("model.norm.weight")
        place = (folder / plain.file.name, plain.offset)
    tampering.flip_bit(*place)
    with pytest.raises(ChecksumError, match=r"model\.norm\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_alone_fills_equal_but_untied_weights(tmp_path):
    config = transformers.LlamaConfig(**tiny_models.GROUPED, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.to(torch.float32).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", scheme="lossless")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_transformers_alone_tells_a_matrix_from_its_multiples(tiny, tmp_path, name):
    """As int8 they have the same codes, chunk for chunk; only their scales differ."""
    source = tampering.copy_of(tiny(name), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for key in ("up_proj.weight", "gate_proj.weight"):
        alike = sorted(other for other in tensors if other.endswith(key))
        assert len(alike) > 1
        for number, other in enumerate(alike):
            tensors[other] = tensors[alike[0]] * 2.0**-number
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out", scheme="int8", include=("*",))
    ours = from_pretrained(tmp_path / "out").state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(same_bits(ours[key], theirs[key]) for key in ours)


_WITHOUT_CODECLLM = """
import sys
import transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as exc:
    sys.exit(0 if "codecllm" not in sys.modules else 3)
sys.exit("a model came out")
"""


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
def test_without_codecllm_a_container_is_an_error_never_random_weights(container, scheme):
    command = [sys.executable, "-c", _WITHOUT_CODECLLM, str(container("llama", scheme))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


AUTO_CLASSES = {
    "t5": transformers.AutoModelForSeq2SeqLM,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
    "bert": transformers.AutoModelForSequenceClassification,
    "llava": transformers.AutoModelForImageTextToText,
    "mpnet": transformers.AutoModel,
}


@pytest.mark.parametrize("name", sorted(AUTO_CLASSES))
def test_every_auto_class_loads_a_container(container, name):
    ours = from_pretrained(container(name, "int8"))
    theirs = AUTO_CLASSES[name].from_pretrained(container(name, "int8"))
    assert type(theirs) is type(ours)
    assert torch.equal(logits(theirs), logits(ours))


_TWICE = """
import importlib, pickle, sys
import codecllm.loader
import codecllm.loader
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
importlib.reload(codecllm.loader)
importlib.reload(sys.modules["codecllm.loader.hf.quantizer"])
sys.modules["codecllm.loader.hf.quantizer"].register()
assert list(AUTO_QUANTIZER_MAPPING).count("codecllm") == 1
model = codecllm.loader.from_pretrained(sys.argv[1], resident="int8")
config = pickle.loads(pickle.dumps(model.config))
assert config.to_dict() == model.config.to_dict()
assert pickle.loads(pickle.dumps(AutoConfig.from_pretrained(sys.argv[1]))).quantization_config
"""


def test_importing_twice_reloading_and_pickling_change_nothing(container):
    command = [sys.executable, "-W", "error", "-c", _TWICE, str(container("llama", "int8"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
