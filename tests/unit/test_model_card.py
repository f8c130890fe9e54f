"""The card names the code that a load runs beside codecllm."""

from __future__ import annotations

from pathlib import Path

from codecllm.formats.container import Container
from codecllm.model_card import make_card

GOOD = Path(__file__).resolve().parents[2] / "conformance" / "good"


def _card(name):
    with Container(GOOD / name) as container:
        return make_card(container, "user/name", None)


def test_code_and_quantization_are_marked():
    card = _card("quantized")
    assert "This repository contains Python code" in card
    assert "- `own.py`, sha256 `" in card
    assert "- custom_code" in card
    assert "The source is quantized (fp8) and stays so" in card


def test_other_containers_have_no_such_marks():
    card = _card("lossless")
    assert "Python code" not in card and "custom_code" not in card and "quantized (" not in card
