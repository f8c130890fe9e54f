"""The examples in the docstrings of `formats` are run, and its pure functions have examples."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import codecllm.formats

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(codecllm.formats.__path__, "codecllm.formats.")
)
WITH_EXAMPLES = [
    "codecllm.formats.checksums",
    "codecllm.formats.codecs.rans_groups",
    "codecllm.formats.codecs.rans_reference",
    "codecllm.formats.codecs.rans_table",
    "codecllm.formats.codecs.raw",
    "codecllm.formats.codecs.zstd",
    "codecllm.formats.codecs.entropy",
    "codecllm.formats.limits",
    "codecllm.formats.schemes.columns",
    "codecllm.formats.schemes.float_bits",
    "codecllm.formats.schemes.int8",
    "codecllm.formats.schemes.lossless",
    "codecllm.formats.shards.chunk_table",
    "codecllm.formats.tiling",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    results = doctest.testmod(importlib.import_module(name), verbose=False)
    assert results.failed == 0
    assert results.attempted or name not in WITH_EXAMPLES


def test_modules_with_examples_are_found():
    assert set(WITH_EXAMPLES) <= set(MODULES)
