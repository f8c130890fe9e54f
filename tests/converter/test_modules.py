"""Modules whose first one becomes the root of the container."""

from __future__ import annotations

import json

import pytest

from codecllm.converter.source.modules import read_modules
from codecllm.formats.errors import SourceError


def _repository(base, *paths):
    (base / "0_T" / "sub").mkdir(parents=True)
    (base / "0_T" / "model.safetensors").touch()
    document = [{"idx": number, "path": path} for number, path in enumerate(paths)]
    (base / "modules.json").write_text(json.dumps(document))
    return base


@pytest.mark.parametrize("path", ["0_T/sub", "./0_T/sub", "0_T//sub/"])
def test_a_module_inside_the_folder_that_moves_is_refused(tmp_path, path):
    with pytest.raises(SourceError, match="inside the folder of the first one"):
        read_modules(_repository(tmp_path, "0_T", path))


def test_every_entry_of_the_folder_that_moves_is_the_root(tmp_path):
    found = read_modules(_repository(tmp_path, "0_T", "0_Tail", "0_T/"))
    assert found.main == "0_T"
    assert [entry["path"] for entry in json.loads(found.document)] == ["", "0_Tail", ""]
