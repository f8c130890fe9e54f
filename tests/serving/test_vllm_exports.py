"""`codecllm export` for engines without the plug-in: what vLLM makes of it."""

from __future__ import annotations

import pytest

from codecllm import api
from tests.serving.engine import IDS, PROMPTS, distance, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize(
    ("name", "prompts"),
    [("llama", IDS), ("qwen2", IDS), pytest.param("smollm2", PROMPTS, marks=pytest.mark.model)],
)
def test_codes_of_four_bits_are_served_without_the_plug_in(engine, made, tmp_path, name, prompts):
    """By vLLM's kernel for a CPU: the dequantized model in vLLM, within the kernel's rounding."""
    container, plain = made(name, "codes4")
    report = api.export(container, tmp_path / "packed", format="compressed-tensors")
    assert "4 bits a code" in report.notes[0]
    served, expected = engine.outputs(tmp_path / "packed", prompts), engine.outputs(plain, prompts)
    print(f"{name}: largest difference {distance(served, expected):.3f}")
    if name == "smollm2":
        # Tokens may differ from the first near-tie on.
        firsts = [[one["ids"][0] for one in outputs] for outputs in (served, expected)]
        assert firsts[0] == firsts[1]
        assert distance(served, expected) < 0.5
    else:
        assert served == expected
    assert "CPUWNA16LinearKernel for CompressedTensorsWNA16" in engine.log.read_text()


@pytest.mark.parametrize(
    ("scheme", "kind"), [("codes5", "uint5b16"), ("all_int8", "uint8b128")], ids=["5", "8"]
)
def test_vllm_reads_other_widths_up_to_its_kernels(engine, made, tmp_path, scheme, kind):
    """vLLM has kernels for 2 to 8 bits on GPUs; on a CPU it has one for 4 bits alone.

    It says so once it has understood the export.
    """
    container, _ = made("llama", scheme)
    api.export(container, tmp_path / "packed", format="compressed-tensors")
    answer = engine.ask(tmp_path / "packed", IDS)
    assert "Failed to find a kernel that can implement the WNA16 linear layer" in answer["message"]
    assert f"Quant type ({kind}) not supported by CPUWNA16" in answer["message"]
