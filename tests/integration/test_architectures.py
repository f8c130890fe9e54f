"""Architectures and layouts x schemes x ways of loading x residencies: the outputs of the source.

A lossless container gives the bits of the source's plain load. An int8 container gives the bits of
the model class filled with the slow reference's dequantized tensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as hf

from codecllm.converter import convert
from codecllm.formats.container import Container
from codecllm.loader import from_pretrained
from codecllm.loader.hf.plain import load_plain
from codecllm.loader.hf.quiet import silenced, without_progress_bars
from codecllm.loader.load_report import read_report
from codecllm.verifier.diagnosis.model.reference_model import build_model, reference_tensors
from codecllm.verifier.load_report import record_load_report
from tests.integration import architectures
from tests.integration.outputs import in_experts_loop, same_bits


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns the folder of an architecture by its name."""
    folders = {}

    def get(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp("architectures") / name
            folders[name] = architectures.make(name, folder)
        return folders[name]

    return get


def _reference(source, out, scheme):
    if scheme == "lossless":
        return load_plain(source).eval()
    with Container(out) as container:
        dtype = load_plain(source).dtype
        return build_model(container, reference_tensors(container, dtype), dtype)


def _auto_class(model):
    """Returns the Auto class that finds the class of a model for its config."""
    for name in sorted(dir(hf)):
        mapping = (
            getattr(getattr(hf, name), "_model_mapping", None) if "AutoModel" in name else None
        )
        if mapping is None or type(model.config) not in mapping:
            continue
        classes = mapping[type(model.config)]
        classes = classes if isinstance(classes, list | tuple) else [classes]
        if classes[0] is type(model):
            return getattr(hf, name)
    return type(model)


@pytest.mark.parametrize("scheme", ["lossless", "int8"])
@pytest.mark.parametrize("name", architectures.NAMES)
def test_outputs_are_the_sources(tmp_path, source, name, scheme):
    out = tmp_path / "out"
    include = ("*",) if scheme == "int8" else ()
    convert(source(name), out, scheme=scheme, include=include)
    record_load_report(out)
    with Container(out) as container:
        report = read_report(container)
    random = report.missing if report is not None else frozenset()
    with silenced(), without_progress_bars():
        expected = _reference(source(name), out, scheme)
        output, values = architectures.output_of(expected), expected.state_dict()
        auto = _auto_class(expected)
        for load in (from_pretrained, auto.from_pretrained):
            model = load(out)
            assert type(model) is type(expected)
            assert model.state_dict().keys() == values.keys()
            for key in values.keys() - random:
                assert same_bits(model.state_dict()[key], values[key]), key
            assert torch.equal(architectures.output_of(model), output)
        # Frozen, as coded weights are: torch takes another kernel for strided inputs otherwise,
        # and for weights that lie as the source's file has them, at no multiple of 64 bytes.
        output = architectures.output_of(in_experts_loop(model).requires_grad_(False))
        compressed = from_pretrained(out, auto_class=auto, resident="compressed")
        compressed.requires_grad_(False)  # tensors that are stored plain
        assert type(compressed) is type(expected)
        assert torch.equal(architectures.output_of(compressed), output)
        if scheme == "int8":
            codes = architectures.output_of(from_pretrained(out, resident="int8"))
            scale = float(output.float().abs().max())
            torch.testing.assert_close(codes, output, rtol=0.02, atol=0.02 * scale)


def test_the_documents_list_every_architecture():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    section = page.partition("## Architectures")[2].partition("\n## ")[0]
    table = section.partition("|---|")[2]
    assert sorted(re.findall(r"`(\w+)`", table)) == architectures.NAMES
    assert f"\n{len(architectures.NAMES)} architectures" in section


def test_the_layouts_are_those_of_published_files(source):
    """Most files here hold names that no class of today has."""
    old = [name for name, (_, _, change) in architectures.LAYOUTS.items() if change is not None]
    assert len(old) >= 10
    assert len(architectures.NAMES) >= 60
    kinds = {json.loads((source(name) / "config.json").read_text())["model_type"] for name in old}
    assert len(kinds) >= 8
