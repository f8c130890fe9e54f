"""The inputs of the fuzz targets, those of the first day and those that once failed, replayed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(path for path in CORPUS.rglob("*") if path.is_file())
MOST_SECONDS = 2.0


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: str(path.relative_to(CORPUS)))
def test_an_input_gives_a_result_or_an_error_of_ours(path):
    target = TARGETS[path.parent.name]
    target(b"")  # what a target makes once is not part of the time
    before = time.thread_time()
    target(path.read_bytes())
    assert time.thread_time() - before < MOST_SECONDS


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_inputs_and_takes_any_cut_of_them(name):
    paths = [path for path in INPUTS if path.parent.name == name]
    assert len(paths) >= 2
    data = paths[0].read_bytes()
    for cut in range(0, min(len(data), 40)):
        TARGETS[name](data[:cut])
