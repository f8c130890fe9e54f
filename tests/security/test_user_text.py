"""Text files that a user names: commands and calibration read them by one function."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from codecllm.calibrator.text import file_text
from codecllm.cli.checking import app
from codecllm.formats.errors import UsageError
from tests.unit.formats.test_user_text import NO_TEXTS


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_commands_and_calibration_refuse_what_is_no_text(tmp_path, kind):
    make, words = NO_TEXTS[kind]
    path = make(tmp_path / "text")
    with pytest.raises(UsageError, match=words):
        file_text(None, tmp_path, path)  # of a calibration
    for command in (["eval", "base", "other"], ["verify", "container", "--diagnose"]):
        result = CliRunner().invoke(app, [*command, "--text", str(path)])
        assert isinstance(result.exception, UsageError), result.output
        assert os.path.basename(path) in str(result.exception)
