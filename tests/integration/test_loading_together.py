"""Loads in many threads at the same time, and loads in a process that runs out of memory.

`CODECLLM_THREAD_SECONDS=300 pytest tests/integration/test_loading_together.py -k threads` runs it
long.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch
import transformers as hf

from codecllm.converter import convert
from codecllm.loader import from_pretrained
from tests.integration import tiny_models

IDS = torch.tensor([[1, 2, 3, 4]])
THREADS = 16
SECONDS = float(os.environ.get("CODECLLM_THREAD_SECONDS", "8"))
# Tied and untied, bf16, fp32 and fp16: transformers keeps dtype and ties in global state.
CONTAINERS = [
    ("llama", "int8"), ("llama_untied", "lossless"), ("gpt2", "int8"), ("gpt_neox", "lossless"),
]  # fmt: skip
RESIDENTS = ("dense", "int8", "compressed")


def _facts(model):
    """Returns dtypes, values and outputs of a model, as they are compared."""
    state = model.state_dict()
    with torch.inference_mode():
        logits = model(IDS).logits
    return {name: (value.dtype, value.clone()) for name, value in state.items()}, logits


def _same(found, expected):
    state, logits = found
    expected_state, expected_logits = expected
    return (
        state.keys() == expected_state.keys()
        and all(
            dtype == state[name][0] and torch.equal(value, state[name][1])
            for name, (dtype, value) in expected_state.items()
        )
        and logits.dtype == expected_logits.dtype
        and torch.equal(logits, expected_logits)
    )


@pytest.mark.timeout(300 + 2 * SECONDS)
def test_threads_that_load_at_the_same_time_get_what_one_load_gives(container):
    expected = {
        (name, scheme, resident): _facts(
            from_pretrained(container(name, scheme), resident=resident, workers=1)
        )
        for name, scheme in CONTAINERS
        for resident in RESIDENTS
        if scheme == "int8" or resident != "int8"
    }
    before = torch.get_default_dtype(), hf.logging.get_verbosity(), torch.is_grad_enabled()
    end = time.monotonic() + SECONDS
    faults, counts = [], [0] * THREADS

    def work(number):
        dice = random.Random(number)
        while not counts[number] or time.monotonic() < end:
            key = dice.choice(sorted(expected))
            name, scheme, resident = key
            try:
                model = from_pretrained(container(name, scheme), resident=resident, workers=1)
                if not _same(_facts(model), expected[key]):
                    faults.append((key, "another model"))
            except Exception as exc:
                faults.append((key, repr(exc)))
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{sum(counts)} loads in {THREADS} threads, {len(faults)} faults")
    assert not faults, faults[:5]
    assert min(counts) >= 1
    assert (
        torch.get_default_dtype(), hf.logging.get_verbosity(), torch.is_grad_enabled(),
    ) == before  # fmt: skip


LIMITED = """
import hashlib, os, resource, signal, sys
import torch
from codecllm.loader import from_pretrained

folder, resident = sys.argv[1:3]
ids = torch.tensor([[1, 2, 3, 4]])

def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def load():
    model = from_pretrained(folder, resident=resident, workers=2)
    with torch.inference_mode():
        return hashlib.sha256(model(ids).logits.float().numpy().tobytes()).digest()

def outcome(expected):
    try:
        return "right" if load() == expected else "WRONG"
    except Exception as exc:
        return type(exc).__name__

def child(code):
    number = os.fork()
    if number == 0:
        signal.alarm(100)
        os._exit(code())
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

read, write = os.pipe()
def save():
    os.write(write, load())
    return 0
assert child(save) == 0
expected = os.read(read, 32)

def limited(limit):
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(limit >> 20, outcome(expected), flush=True)
    return 0

for step in range(int(sys.argv[3])):
    # From nothing more than now to all that the load needs.
    code = child(lambda: limited(used() + (step * step * 20 << 20)))
    if code:
        print(step, "ended with", code, flush=True)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An int8 container of 40 million weights, of which 32 million are in one tensor."""
    base = tmp_path_factory.mktemp("wide")
    config = dict(tiny_models.COMMON, vocab_size=65_536, hidden_size=512, intermediate_size=1024)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(base / "model")
    convert(base / "model", base / "out")
    return base / "out"


@pytest.mark.parametrize("resident", RESIDENTS)
def test_a_load_without_memory_is_an_error_and_never_another_model(wide, resident):
    steps = 6
    command = [sys.executable, "-c", LIMITED, str(wide), resident, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    print(resident, outcomes)
    assert len(outcomes) == steps
    # Without memory to raise an error the interpreter aborts and the dynamic linker exits with 127.
    ended = {"ended with -6", "ended with 127"}
    assert set(outcomes) <= {"right", "MemoryError", "OSError"} | ended, done.stdout
    assert sum(outcome in ended for outcome in outcomes) <= 2, done.stdout
    assert outcomes[-1] == "right"
    assert outcomes[0] != "right"
