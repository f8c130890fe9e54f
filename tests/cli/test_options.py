"""The command line's choices are those of the library, which `--help` does not import."""

from __future__ import annotations

from typing import get_args

import pytest

from codecllm import api
from codecllm.cli import options
from codecllm.converter import options as converter_options
from codecllm.formats.codecs import CodecName
from codecllm.loader import pretrained
from codecllm.verifier import verification


@pytest.mark.parametrize(
    ("shown", "accepted"),
    [
        (options.SchemeName, converter_options.Scheme),
        (options.CodecChoice, CodecName),
        (options.QualityName, converter_options.Quality),
        (options.NonFiniteName, converter_options.NonFinite),
        (options.LevelName, verification.Level),
        (options.FormatName, api.ExportFormat),
    ],
)
def test_choices_are_those_of_the_library(shown, accepted):
    assert get_args(shown) == get_args(accepted)


def test_residencies_are_those_of_the_library_that_a_cpu_can_have():
    """The commands load onto the CPU, and `packed` needs a GPU."""
    assert {*get_args(options.ResidentName), "packed"} == set(get_args(pretrained.Resident))
