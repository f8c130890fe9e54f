"""Files of a container's folder by which a load would give another model, or none."""

from __future__ import annotations

import json

import pytest
import torch

from codecllm.formats.errors import LayoutError, NotAContainerError, SchemaError
from codecllm.loader import from_pretrained
from codecllm.loader.load import Load, LoadOptions
from tests import tampering

REPORT = {
    "format": "codecllm-load-report", "version": 1, "class": "LlamaForCausalLM", "missing": [],
    "unexpected": [],
}  # fmt: skip


@pytest.fixture
def folder(container, tmp_path):
    return tampering.copy_of(container("llama", "int8"), tmp_path / "c")


def test_a_container_without_a_config_is_no_model(folder):
    def drop(document):
        document["files"] = [
            record for record in document["files"] if record["name"] != "config.json"
        ]

    (folder / "config.json").unlink()
    tampering.reseal(folder, drop)
    with pytest.raises(NotAContainerError, match=r"no config\.json"):
        from_pretrained(folder)


def test_an_adapter_that_is_not_listed_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LayoutError, match="would change the model by it") as caught:
        from_pretrained(folder)
    assert caught.value.file == "adapter_config.json"


def test_an_adapter_that_is_listed_is_refused_too(folder):
    """Loads would give two models, one with peft and one without, for one manifest."""
    tampering.add_listed(folder, "adapter_config.json", b'{"peft_type": "LORA"}')
    with pytest.raises(LayoutError, match="a container has no adapter") as caught:
        from_pretrained(folder)
    assert caught.value.file == "adapter_config.json"


def test_a_report_of_this_version_is_read(folder):
    report = REPORT | {"unexpected": ["extra"]}
    tampering.add_listed(folder, "load_report.json", json.dumps(report).encode())
    load = Load(folder, LoadOptions())
    load.close()
    assert load.report.unexpected == {"extra"}


@pytest.mark.parametrize(
    "change",
    [{"format": "report"}, {"version": 2}, {"class": None}, {"missing": "a"}, {"unexpected": [1]}],
    ids=lambda change: next(iter(change)),
)
def test_a_report_of_another_form_is_refused(folder, change):
    tampering.add_listed(folder, "load_report.json", json.dumps(REPORT | change).encode())
    with pytest.raises(SchemaError, match="not a load report of version 1") as caught:
        from_pretrained(folder)
    assert caught.value.file == "load_report.json"


def test_a_load_that_is_started_again_goes_on_and_begins_anew_for_another_dtype(container):
    load = Load(container("llama", "int8"), LoadOptions())
    try:
        load.start(torch.float32)
        first = load._reader
        load.start(torch.float32)
        assert load._reader is first
        load.start(torch.bfloat16)
        assert load._reader is not first
    finally:
        load.close()
