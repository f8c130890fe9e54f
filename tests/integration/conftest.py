"""Models and containers that many tests read; none of them may be changed by a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from codecllm.converter import convert
from demo import models
from tests.integration import tiny_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a tiny model by its name in `tiny_models.MAKERS`."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny_models.MAKERS[name](tmp_path_factory.mktemp("tiny") / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def container(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]
) -> Callable[[str, str], Path]:
    """Returns the container of a tiny model: all its matrices int8, or everything lossless."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, scheme: str) -> Path:
        if (name, scheme) not in made:
            out = tmp_path_factory.mktemp("container") / f"{name}-{scheme}"
            convert(tiny(name), out, scheme=scheme, include=("*",) if scheme == "int8" else ())
            made[name, scheme] = out
        return made[name, scheme]

    return get


@pytest.fixture(scope="session")
def minilm_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM as an int8 container, without baseline."""
    out = tmp_path_factory.mktemp("minilm") / "int8"
    convert(models.minilm(), out)
    return out
