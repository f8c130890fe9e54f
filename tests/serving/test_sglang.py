"""Containers in SGLang: its engine on a CPU, on a platform without SGLang's kernels."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from codecllm.converter import convert
from tests import tampering
from tests.hub_server import HubServer
from tests.serving import served_models
from tests.serving.engine import IDS
from tests.serving.http_client import free_port, post, wait_until_healthy
from tests.serving.pushing import ONLINE, REPO, push
from tests.serving.sglang_engine import (
    answers_in,
    ask,
    serve_arguments,
    start,
    variables,
    why_not,
)

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(1200),
    pytest.mark.slow,
]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama_alias", "mixed"), ("phi3", "all_int8"), ("qwen2", "mixed"), ("qwen3_moe", "all_int8")],
)
def test_a_container_is_served_as_its_export(made, tmp_path, name, scheme):
    """Tokens and log-probabilities are equal, not only close."""
    container, plain = made(name, scheme)
    served = ask(tmp_path, [container])
    assert served == ask(tmp_path, [plain])
    assert len(served[0]) == len(IDS)


def test_two_ranks(made, tmp_path):
    container, plain = made("llama", "all_int8")
    options = {"tp_size": 2, "more": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}}
    assert ask(tmp_path, [container], **options) == ask(tmp_path, [plain], **options)


@pytest.mark.model
def test_smollm2_in_five_bits(made, tmp_path):
    container, plain = made("smollm2", "bits5")
    assert ask(tmp_path, [container]) == ask(tmp_path, [plain])


@pytest.mark.model
def test_the_openai_interface(made, tmp_path):
    container, _ = made("smollm2", "int8")
    log, port = tmp_path / "log", free_port()
    address = f"http://127.0.0.1:{port}"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *serve_arguments(container, port)],
            stdout=file,
            stderr=file,
            env=variables(),
        )
    try:
        wait_until_healthy(process, address, log)
        body = {"model": str(container), "temperature": 0, "max_tokens": 8}
        answer = post(address, "/v1/completions", {**body, "prompt": "The capital of France is"})
        assert answer["choices"][0]["text"].startswith(" Paris")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert "Loading codecllm container" in log.read_text()


def test_weights_are_exchanged_while_the_engine_runs(made, tmp_path):
    """`update_weights_from_disk`, from a container to another one and to a plain model."""
    first, plain = made("llama", "all_int8")
    second, source = made("llama", "lossless")
    expected = ask(tmp_path, [plain])[0]
    answers = ask(tmp_path, [second, first, source])
    assert answers[0] == answers[2]
    assert answers[1] == expected
    assert answers[0] != answers[1]


def test_a_damaged_chunk_ends_the_start(made, tmp_path):
    tensor = "model.layers.1.mlp.down_proj.weight"
    folder = tampering.copy_of(made("llama", "all_int8")[0], tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, tensor), bit=3)
    done = start(tmp_path, [folder])
    assert done.returncode != 0
    assert not (tmp_path / "answers").exists()
    assert "ChecksumError: model-00001-of-00001.safetensors: tensor " in done.stdout
    assert f"tensor '{tensor}' chunk 0 at byte" in done.stdout


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("lm_head.weight", "'lm_head.weight': the parameter got no weights from the container"),
        (
            "model.layers.0.self_attn.k_proj.weight",
            "tensor 'model.layers.0.self_attn.qkv_proj.weight': a part of the parameter got no "
            "weights from the container, got 192 rows, expected 256",
        ),
    ],
)
def test_weights_that_never_come(tmp_path, left_out, message):
    """SGLang itself would serve whatever was in memory."""
    source = served_models.make("llama", tmp_path / "s")
    tensors = load_file(source / "model.safetensors")
    del tensors[left_out]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "c", scheme="lossless")
    done = start(tmp_path, [tmp_path / "c"])
    assert done.returncode != 0
    assert message in done.stdout


def test_a_name_on_the_hub_and_a_revision(made, tmp_path):
    container, _ = made("llama", "all_int8")
    with HubServer() as hub:
        push(hub, container, tmp_path / "writer")
        reader = hub.environment(token="hf_writer", cache=str(tmp_path / "reader"))
        commit = hub.repos[REPO].refs["main"]
        done = start(tmp_path, [REPO], more={**reader, **ONLINE}, revision=commit)
    assert done.returncode == 0, done.stdout[-4000:]
    assert answers_in(tmp_path) == ask(tmp_path, [container])


def test_sglang_without_the_plug_in(made, tmp_path):
    done = start(tmp_path, [made("llama", "all_int8")[0]], more={"SGLANG_PLUGINS": "none"})
    assert done.returncode != 0
    assert "Unknown quantization method: codecllm" in done.stdout
