"""One engine for all tests, and the models that it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from codecllm import api
from codecllm.converter import ParamsChoice, convert
from codecllm.converter.plan.params import QuantParams
from codecllm.converter.plan.tensor_plan import TensorPlan
from demo import models
from tests.serving import served_models
from tests.serving.engine import Engine, running
from tests.stepped import make_steps, mixed

Made = Callable[[str, str], tuple[Path, Path]]
ALL = {"include": ("*.weight",), "exclude": ("*norm*",)}
"""Quantizes the matrices of tiny models, which are too small for the default choice."""

SCHEMES: dict[str, Callable[[Path, Path], object]] = {
    "lossless": lambda source, out: convert(source, out, scheme="lossless"),
    "int8": lambda source, out: convert(source, out),
    "bits5": lambda source, out: api.convert(source, out, bits=5, calibrate="none", baseline=False),
    "all_int8": lambda source, out: convert(source, out, **ALL),
    "codes4": lambda source, out: api.convert(source, out, code_bits=4, baseline=False, **ALL),
    "codes5": lambda source, out: api.convert(source, out, code_bits=5, baseline=False, **ALL),
    # Scales of columns, and codes of 16 bits.
    "mixed": lambda source, out: convert(source, out, choice=ParamsChoice(mixed), **ALL),
    "some_experts": lambda source, out: convert(
        source, out, include=("*.weight",), exclude=("*norm*", "*experts.7.up*")
    ),
    "mixed_experts": lambda source, out: convert(
        source, out, choice=ParamsChoice(_mixed_experts), **ALL
    ),
}


def _mixed_experts(plan: TensorPlan) -> QuantParams:
    """Returns steps for experts: some codes are beyond 8 bits, of one matrix many of them."""
    name = plan.source.name
    wide = {"experts.3.up": 0.02, "experts.5.down": 0.012}
    factor = next((value for part, value in wide.items() if part in name), 0.1)
    return make_steps(plan, factor, columns="gate_proj" not in name)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM, its engine inside of one process."""
    with running(tmp_path_factory.mktemp("vllm")) as engine:
        yield engine


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes a container of a model, once; returns it and the plain model that it stands for."""
    folder = tmp_path_factory.mktemp("containers")

    def make(name: str, scheme: str) -> tuple[Path, Path]:
        source = folder / name
        if name == "smollm2":
            source = models.smollm2()
        elif not source.exists():
            served_models.make(name, source)
        out = folder / f"{name}-{scheme}"
        plain = source if scheme == "lossless" else folder / f"{name}-{scheme}-plain"
        if not out.exists():
            SCHEMES[scheme](source, out)
            if plain != source:
                api.export(out, plain)
        return out, plain

    return make
