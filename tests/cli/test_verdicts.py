"""The last line of `verify` says whether the container or the machine is at fault."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from codecllm.formats.errors import ChecksumError, UnsupportedEnvironmentError, UsageError
from codecllm.verifier.rendering import render_report
from codecllm.verifier.report import Report, Stage


def _last_line(*errors):
    stage = Stage("baseline", "a text", [])
    for error in errors:
        stage.fail(error)
    out = io.StringIO()
    render_report(Report("c", "full", None, [Stage("structure"), stage]), Console(file=out))
    return out.getvalue().splitlines()[-1]


def test_nothing_is_wrong():
    assert _last_line().startswith("verified: structure, baseline")


@pytest.mark.parametrize("kind", [UnsupportedEnvironmentError, UsageError])
def test_a_machine_that_cannot_check_is_no_fault_of_a_container(kind):
    assert _last_line(kind("no class")) == "not verified: not all checks could run here"


def test_a_fault_of_the_container_outranks_the_machines():
    line = _last_line(UnsupportedEnvironmentError("no class"), ChecksumError("other bytes"))
    assert line == "not what was published: 2 faults"
