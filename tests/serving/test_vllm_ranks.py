"""Tensor parallelism: two ranks on the CPU, each with its cut of every matrix."""

from __future__ import annotations

import pytest

from tests import tampering
from tests.serving.engine import IDS, TWO_RANKS, distance, running, why_not
from tests.serving.test_vllm_codes import CODES

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(900),
    pytest.mark.slow,
]
RANKS = {"distributed_executor_backend": "mp", "tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks"), TWO_RANKS) as engine:
        yield engine


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_two_ranks_serve_a_container_as_its_plain_form(two_ranks, made, name):
    container, plain = made(name, "mixed")
    served = two_ranks.outputs(container, IDS, **RANKS)
    assert served == two_ranks.outputs(plain, IDS, **RANKS)


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("llama", "mixed", {}),
        ("qwen3_moe", "mixed_experts", {}),
        ("qwen3_moe", "mixed_experts", {"enable_expert_parallel": True}),
    ],
    ids=["llama", "experts_cut", "experts_shared_out"],
)
def test_two_ranks_with_codes(two_ranks, engine, made, name, scheme, options):
    container, _ = made(name, scheme)
    served = two_ranks.outputs(container, IDS, dtype="float32", **RANKS, **CODES, **options)
    assert distance(served, engine.outputs(container, IDS, dtype="float32")) < 1e-3


def test_a_damaged_chunk_ends_every_rank(two_ranks, made, tmp_path):
    tensor = "model.layers.1.mlp.down_proj.weight"
    folder = tampering.copy_of(made("llama", "all_int8")[0], tmp_path / "c")
    tampering.flip_bit(*tampering.payload_place(folder, tensor), bit=3)
    assert "error" in two_ranks.ask(folder, IDS, **RANKS)
    log = two_ranks.log.read_text()
    found = [line for line in log.splitlines() if f"tensor '{tensor}' chunk 0 at byte" in line]
    assert {rank for rank in (0, 1) if any(f"TP{rank}" in line for line in found)} == {0, 1}
