"""The examples in the docstrings of `converter` and of the command line's options are run."""

from __future__ import annotations

import doctest
import importlib

import pytest

WITH_EXAMPLES = [
    "codecllm.cli.options",
    "codecllm.converter.exports.packed_words",
    "codecllm.converter.options",
    "codecllm.converter.plan.params",
    "codecllm.converter.plan.policy",
    "codecllm.converter.rate.feedback",
    "codecllm.converter.rate.search",
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_say(name):
    results = doctest.testmod(importlib.import_module(name), verbose=False)

    assert results.failed == 0
    assert results.attempted
