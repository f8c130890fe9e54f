"""`codecllm export` for engines without the plug-in: what vLLM makes of it."""

from __future__ import annotations

import pytest

from codecllm import api
from tests.serving.engine import IDS, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]


def test_vllm_reads_a_packed_export_up_to_its_kernels(engine, made, tmp_path):
    """vLLM has kernels for packed codes of 8 bits on GPUs; on a CPU it has them for 4 bits alone.

    It says so once it has understood the export.
    """
    container, _ = made("llama", "all_int8")
    api.export(container, tmp_path / "packed", format="compressed-tensors")
    answer = engine.ask(tmp_path / "packed", IDS)
    assert "Failed to find a kernel that can implement the WNA16 linear layer" in answer["message"]
    assert "Quant type (uint8b128) not supported by CPUWNA16" in answer["message"]
