"""`vllm serve` as a user starts it: the OpenAI interface over HTTP, and its exit codes."""

from __future__ import annotations

import signal
import subprocess
from contextlib import contextmanager

import pytest

from tests import tampering
from tests.serving.engine import ONE_PROCESS, PROMPTS, variables, why_not
from tests.serving.http_client import START_SECONDS, free_port, post, wait_until_healthy

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(900),
    pytest.mark.model,
    pytest.mark.slow,
]


@contextmanager
def serving(folder, log, *options):
    """Starts `vllm serve`; yields the process and its address."""
    port = free_port()
    command = ["vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    settings = {**ONE_PROCESS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, "--max-model-len", "256", "--gpu-memory-utilization", "0.3", *options],
            stdout=file,
            stderr=file,
            env=variables(log.parent, settings),
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_the_openai_interface_gives_the_plain_models_text(engine, made, tmp_path):
    container, plain = made("smollm2", "int8")
    expected = [output["text"] for output in engine.outputs(plain)]
    log = tmp_path / "log"
    with serving(container, log, "--enforce-eager") as (process, address):
        wait_until_healthy(process, address, log)
        body = {"model": str(container), "temperature": 0, "max_tokens": 16, "ignore_eos": True}
        answer = post(address, "/v1/completions", {**body, "prompt": PROMPTS})
        assert [choice["text"] for choice in answer["choices"]] == expected
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        chat = post(address, "/v1/chat/completions", {**body, "messages": messages})
        assert "Paris" in chat["choices"][0]["message"]["content"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert "Loading codecllm container" in log.read_text()


def test_a_flipped_bit_ends_the_start(made, tmp_path):
    tensor = "model.layers.7.mlp.up_proj.weight"
    folder = tampering.copy_of(made("smollm2", "int8")[0], tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, tensor, chunk=2), bit=5)
    log = tmp_path / "log"
    with serving(folder, log, "--enforce-eager") as (process, _):
        assert process.wait(START_SECONDS) != 0
    text = log.read_text()
    assert f"tensor '{tensor}' chunk 2 at byte" in text
    assert "ChecksumError" in text
    assert "Application startup complete" not in text
