"""What cannot be served right is not served: one error that says what and where."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from codecllm.converter import convert
from tests import tampering
from tests.serving import served_models
from tests.serving.engine import IDS, ONE_PROCESS, running, variables, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]
TENSOR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def container(made):
    return made("llama", "all_int8")[0]


def test_a_damaged_chunk(engine, container, tmp_path):
    folder = tampering.copy_of(container, tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, TENSOR), bit=3)
    answer = engine.ask(folder, IDS)
    assert answer["error"] == "ChecksumError"
    assert f"tensor '{TENSOR}' chunk 0 at byte" in answer["message"]


def test_a_damaged_side_file(engine, container, tmp_path):
    folder = tampering.copy_of(container, tmp_path / "c")
    text = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(text.replace("1", "3", 1))
    answer = engine.ask(folder, IDS)
    assert (answer["error"], answer["message"][:22]) == ("ChecksumError", "generation_config.json")


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"manifest_sha256": "0" * 64}, "ChecksumError", "manifest is not the expected one"),
        ({"workers": 0}, "UsageError", "not a value of workers, got 0"),
        ({"workers": "2"}, "UsageError", "not a value of workers, got '2'"),
        ({"wokers": 2}, "ValueError", "Unexpected extra config keys"),
    ],
)
def test_options(engine, container, extra, error, message):
    answer = engine.ask(container, IDS, model_loader_extra_config=extra)
    assert answer["error"] == error
    assert message in answer["message"]


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_another_load_format(engine, container, load_format):
    answer = engine.ask(container, IDS, load_format=load_format)
    assert answer["error"] == "UsageError"
    assert "read by --load-format codecllm" in answer["message"]


def test_another_quantization(engine, container):
    answer = engine.ask(container, IDS, quantization="fp8")
    assert "does not match" in answer["message"]


def test_vllms_own_quantization_on_top(engine, container):
    answer = engine.ask(container, IDS, quantization_config={"linear": "fp8_per_tensor"})
    assert answer["error"] == "UsageError"
    assert "--quantization-config does not go with a codecllm container" in answer["message"]


def test_vllm_without_the_plug_in(container, tmp_path):
    with running(tmp_path, VLLM_PLUGINS="none") as engine:
        answer = engine.ask(container, IDS)
    assert "Unknown quantization method: codecllm" in answer["message"]


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("lm_head.weight", "not initialized from checkpoint: {'lm_head.weight'}"),
        (
            "model.layers.0.self_attn.k_proj.weight",
            "tensor 'model.layers.0.self_attn.qkv_proj.weight': a part of the parameter got no "
            "weights from the container, got 192 rows, expected 256",
        ),
        ("model.layers.1.mlp.gate_proj.weight", "got 256 rows, expected 512"),
    ],
)
def test_weights_that_never_come(engine, tmp_path, left_out, message):
    source = served_models.make("llama", tmp_path / "s")
    tensors = load_file(source / "model.safetensors")
    del tensors[left_out]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "c", scheme="lossless")
    assert message in engine.ask(tmp_path / "c", IDS)["message"]


def test_a_container_with_another_librarys_weights(engine, tmp_path):
    source = served_models.make("llama", tmp_path / "s")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = (source / "config.json").read_text().rstrip()
    block = '"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}'
    (source / "config.json").write_text(config[:-1].rstrip() + f", {block}}}")
    convert(source, tmp_path / "c", scheme="lossless")
    answer = engine.ask(tmp_path / "c", IDS)
    assert answer["error"] == "UsageError"
    assert "another library's quantization" in answer["message"]


def test_the_path_of_a_container_is_no_key_of_the_compile_cache(engine, made, tmp_path):
    """Two containers under one path must not share compiled code."""
    keys = []
    for scheme in ("all_int8", "mixed"):
        shutil.copytree(made("llama", scheme)[0], tmp_path / "c")
        keys.append(engine.ask(tmp_path / "c", IDS)["hash"])
        shutil.rmtree(tmp_path / "c")
    assert keys[0] != keys[1]


_SILENT = """
import sys
from types import SimpleNamespace
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from codecllm.serving.vllm_loader import CodecLLMLoader
from codecllm.serving.vllm_names import LoadConfig

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(4, 2))
        self.second = torch.nn.Parameter(torch.zeros(4, 2))

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "model.norm.weight":
                self.first.data.fill_(1)
                if sys.argv[2] == "both":
                    self.second.data.fill_(1)

config = SimpleNamespace(
    quantization="codecllm", model=sys.argv[1], revision=None, hf_token=None,
    dtype=torch.bfloat16, is_moe=False, multimodal_config=None,
)
with set_current_vllm_config(VllmConfig()):
    CodecLLMLoader(LoadConfig(load_format="codecllm")).load_weights(Model(), config)
"""


@pytest.mark.parametrize("filled", ["first", "both"])
def test_a_model_that_does_not_tell_what_it_loaded(container, tmp_path, filled):
    done = subprocess.run(
        [sys.executable, "-c", _SILENT, str(container), filled],
        env=variables(tmp_path, ONE_PROCESS),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    refused = "tensor 'second': the parameter got no weights from the container" in done.stderr
    assert (done.returncode, refused) == ((0, False) if filled == "both" else (1, True))
